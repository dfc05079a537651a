"""Programs of torch beside the ONNX artifact of their plan."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from alloc_moe.compiler import compile


@pytest.mark.slow
def test_a_program_has_the_artifacts_logits_and_tokens(
    load: Callable[[str], ModuleType],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [tmp_path / f"out.{end}" for end in ("onnx", "pt")]
    for path in paths:
        profile = tmp_path / "profile.json"
        compile(checkpoint("deepseek_v2"), output=path, tokens=256, profile=profile)
    monkeypatch.setattr(sys, "argv", ["programs.py", *map(str, paths), "--turns", "1"])
    load("benchmarks/quality/programs").main()
    own, other = capsys.readouterr().out.splitlines()
    assert "largest logit difference 0.0e+00, 0 of 192 tokens differ" in own
    found = re.search(r"difference (\S+), 0 of 192 tokens differ", other)
    assert found is not None
    assert 0 < float(found[1]) < 1e-4
