"""Token sizes are fitted once for a profile, and again for something else; damaged are refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.errors import ProfileError
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import Compiled
from alloc_moe.compiler.sensitivity.token_sizes import kept
from alloc_moe.compiler.sensitivity.token_sizes.kept import fit_once, token_sizes_path
from alloc_moe.runtime.artifact.token_sizes import TokenSizes
from alloc_moe.runtime.console import Console

Compile = Callable[..., Compiled]
Fit = Callable[..., tuple[TokenSizes, ...]]


class _StopError(Exception):
    """Stands for a kill."""


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by each fit."""
    calls: list[str] = []
    fit = kept.fit_token_sizes

    def counted(*given: Any) -> tuple[TokenSizes, ...]:
        calls.append("fit")
        return fit(*given)

    monkeypatch.setattr(kept, "fit_token_sizes", counted)
    return calls


@pytest.fixture
def fit(moe_model: Callable[[str], MoeModel], calibration: CalibrationSet, tmp_path: Path) -> Fit:
    """Return a function that fits a small model's token sizes, or reads them."""
    moe = moe_model("olmoe")

    def run(size: float = 1.0, **changed: Any) -> tuple[TokenSizes, ...]:
        sizes = [[size] * layer.num_experts for layer in moe.layers]
        text = dataclasses.replace(calibration, **changed)
        return fit_once(moe, text, sizes, tmp_path / "kept.json", Console())

    return run


def test_they_are_kept_beside_the_profile_and_each_has_its_own() -> None:
    profiles = [Path("folder") / name for name in ("a.profile.json", "a.json", "a")]
    paths = [token_sizes_path(profile) for profile in profiles]
    assert paths[0] == Path("folder/a.profile.json.token-sizes.json")
    assert len({*paths, *profiles}) == 6


def test_what_was_fitted_is_read_again_and_that_is_told(
    fit: Fit, fits: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fit()
    assert "before" not in capsys.readouterr().err
    assert fit() == first
    assert fits == ["fit"]
    assert f"Token sizes were fitted before: {tmp_path / 'kept.json'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 7}, r"the seed \(there \d+, now 7\)"),
        ({"sha256": "beef"}, r"the calibration text \(there .*, now beef\)"),
        ({"size": 2.0}, r"the profile's sizes of experts \(there .*\)"),
    ],
)
def test_those_of_something_else_are_fitted_again_and_that_is_told(
    fit: Fit,
    fits: list[str],
    changed: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit()
    capsys.readouterr()
    again = fit(**changed)
    said = capsys.readouterr().err
    assert re.search(rf"Token sizes are fitted again, for {words} changed: .*kept\.json\n", said)
    assert fit(**changed) == again
    assert fits == ["fit", "fit"]


def test_those_of_another_way_to_fit_are_fitted_again(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit()
    monkeypatch.setattr(kept, "METHOD", (1, 2))
    fit()
    assert "are fitted again, for how they are fitted (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.update(format=9), "can't be read: format 9, this version reads 2"),
        (lambda data: data.pop("seed"), "can't be read: it lacks seed. Delete the file."),
        (lambda data: data["layers"].pop(), "are damaged: their digest is another. Delete"),
        (lambda data: data["layers"][1].update(values="AAA="), "their digest is another"),
        (lambda data: data.update(seed=data["seed"] + 1), "their digest is another"),
        (lambda data: _changed_digit(data["layers"][0]), "their digest is another"),
        (lambda data: _cut(data), "are damaged: they don't fit the model's layers. Delete"),
    ],
    ids=["format", "field", "layers", "values", "made of", "one digit", "of less layers"],
)
def test_damaged_ones_are_refused(
    fit: Fit, tmp_path: Path, damage: Callable[[Any], object], message: str
) -> None:
    fit()
    path = tmp_path / "kept.json"
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=message):
        fit()


def test_where_they_can_not_be_kept_that_is_told_and_nothing_fails(
    fit: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "replace", _full)
    assert fit()
    said = capsys.readouterr().err
    assert "Warning: Token sizes will be fitted again next time. What was fitted can't be" in said
    assert not (tmp_path / "kept.json").exists()


def test_a_killed_compile_and_another_budget_fit_them_no_second_time(
    compile_to: Compile,
    fits: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    profile = tmp_path / "small.profile.json"
    (tmp_path / "whole").mkdir()
    undisturbed = compile_to(tmp_path / "whole" / "out.onnx", budget=0.5)
    with monkeypatch.context() as patch:
        patch.setattr("alloc_moe.compiler.pipeline._stated", _stop)
        with pytest.raises(_StopError):
            compile_to(tmp_path / "out.onnx", budget=0.5, profile=profile)
    assert len(fits) == 2
    talking = {"profile": profile, "console": Console()}
    resumed = compile_to(tmp_path / "out.onnx", budget=0.5, **talking)
    assert resumed.path.read_bytes() == undisturbed.path.read_bytes()
    other = compile_to(tmp_path / "other.onnx", budget=0.75, **talking)
    assert len(fits) == 2
    layers = zip(resumed.plan.layers, other.plan.layers, strict=True)
    assert all(one.token_sizes == two.token_sizes is not None for one, two in layers)
    again = f"Token sizes were fitted before: {token_sizes_path(profile)}"
    assert capsys.readouterr().err.count(again) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"token_sizes": False},
        {"redistribute": "threshold"},
        {"budget": 1.0, "cap": 2},
        {"target_bytes": "1GB", "cap": 2},
    ],
    ids=str,
)
def test_a_compile_that_needs_none_reads_none(
    compile_to: Compile, tmp_path: Path, options: dict[str, Any]
) -> None:
    profile = tmp_path / "p.json"
    path = token_sizes_path(profile)
    path.write_text("damaged")
    compile_to(tmp_path / "out.onnx", profile=profile, **options)
    assert path.read_text() == "damaged"


def test_a_compile_that_needs_some_names_the_damaged_file(
    compile_to: Compile, tmp_path: Path
) -> None:
    profile = tmp_path / "p.json"
    token_sizes_path(profile).write_text("damaged")
    with pytest.raises(ProfileError, match=r"p\.json\.token-sizes\.json can't be read.*Delete the"):
        compile_to(tmp_path / "out.onnx", profile=profile)


def _changed_digit(layer: dict[str, str]) -> None:
    layer["values"] = ("A" if layer["values"][0] != "A" else "B") + layer["values"][1:]


def _cut(data: dict[str, Any]) -> None:
    data["layers"].pop()
    data["sha256"] = kept._digest(data)


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _stop(*_: object) -> None:
    raise _StopError
