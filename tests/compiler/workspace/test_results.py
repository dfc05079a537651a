"""Tensors by name, kept in files or in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alloc_moe.compiler.workspace.results import NamedResults, SavedResults


@pytest.mark.parametrize("folder", ["passes", None])
def test_tensors_are_found_by_name(tmp_path: Path, folder: str | None) -> None:
    results = SavedResults(tmp_path / folder if folder else None)
    named = NamedResults(results, ["made of this"])
    named.keep("a", [torch.arange(3), torch.ones(2)])
    found = named.find("a")
    assert found is not None
    assert [tensor.tolist() for tensor in found] == [[0, 1, 2], [1, 1]]
    assert named.find("b") is None
    assert NamedResults(results, ["made of that"]).find("a") is None


def test_files_are_found_by_another_process(tmp_path: Path) -> None:
    for name in ("a", "b"):
        NamedResults(SavedResults(tmp_path / "passes"), ["x"]).keep(name, [torch.ones(1)])
    again = NamedResults(SavedResults(tmp_path / "passes"), ["x"])
    assert again.find("a") is not None
    before = again.digest({"a", "b"})
    assert before == again.digest(["b", "a"])
    again.keep("b", [torch.zeros(1)])
    assert again.digest({"a", "b"}) != before
