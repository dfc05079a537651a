"""Which sensitivities a sweep measures for its methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.sweep import cells as sweep
from alloc_moe.compiler.sweep.methods import parse_method
from alloc_moe.runtime.console import Console

Models = Callable[[str], MoeModel]


@pytest.fixture
def work(moe_model: Models, calibration: CalibrationSet, tmp_path: Path) -> sweep._Work:
    options = sweep.SweepOptions("mixtral", tmp_path, ("0.5",), (), tmp_path / "text")
    scored = sweep.HeldOut("text", "0" * 64, np.array([1, 2, 3], np.intc))
    return sweep._Work(options, Console(quiet=True), moe_model("mixtral"), [calibration], scored)


def test_sensitivities_are_measured_with_what_will_run_unless_apart(
    work: sweep._Work, calibration: CalibrationSet, tmp_path: Path
) -> None:
    expected = {
        "fisher+sequence": ("sequence", "none"),
        "fisher+batch+affine": ("sequence", "affine"),
        "fisher+sequence+gain": ("sequence", "gain"),
        "fisher+batch+affine+apart": ("none", "none"),
        "fisher+price+affine": ("none", "none"),
    }
    for name, wanted in expected.items():
        profile = work._profile(parse_method(name), calibration)
        assert profile is not None
        assert (profile.redistribution, profile.correction) == wanted
    assert work._profile(parse_method("uniform+affine"), calibration) is None
    assert {path.name for path in tmp_path.iterdir()} == {
        "profile-fisher-sequence-none-0.json",
        "profile-fisher-sequence-affine-0.json",
        "profile-fisher-sequence-gain-0.json",
        "profile-fisher-none-none-0.json",
    }
    found = [(each.redistribution, each.correction) for each in work.sensitivities()]
    assert found == list(dict.fromkeys(expected.values()))


def test_a_cell_depends_on_the_correction_it_was_planned_with(
    work: sweep._Work, calibration: CalibrationSet
) -> None:
    names = ["kl+batch+affine", "kl+batch+affine+apart", "kl+batch+gain", "kl+price+affine"]
    keys = [work._key(parse_method(name), "0.5", calibration) for name in names]
    assert [key.count('"affine"') for key in keys] == [2, 1, 0, 1]
