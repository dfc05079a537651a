"""Which sensitivities a sweep measures for its methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.sweep.budgets import BudgetJobs
from alloc_moe.compiler.sweep.held_out import HeldOut
from alloc_moe.compiler.sweep.methods import parse_method
from alloc_moe.compiler.sweep.models import FLOAT32, Models, WeightType
from alloc_moe.compiler.sweep.running import HeldOutRuns
from alloc_moe.runtime.console import Console

QUIET = Console(quiet=True)


@pytest.fixture
def jobs(moe_model: Callable[[str], MoeModel], tmp_path: Path) -> Callable[..., BudgetJobs]:
    """Return a function from a type of weights to the cells of the small Mixtral."""
    moe = moe_model("mixtral")
    scored = HeldOut("text", "1" * 64, np.array([1, 2, 3], np.intc))
    runs = HeldOutRuns(scored, moe.layers, tmp_path, 1, QUIET)
    models = Models(moe, lambda: moe, QUIET)

    def make(weights: WeightType = FLOAT32) -> BudgetJobs:
        return BudgetJobs(moe.checkpoint, weights, models, runs, scored, tmp_path, QUIET)

    return make


def test_sensitivities_are_measured_with_what_will_run_unless_apart(
    moe_model: Callable[[str], MoeModel],
    jobs: Callable[..., BudgetJobs],
    calibration: CalibrationSet,
    tmp_path: Path,
) -> None:
    expected = {
        "fisher+sequence": ("sequence", "none"),
        "fisher+batch+affine": ("sequence", "affine"),
        "fisher+sequence+gain": ("sequence", "gain"),
        "fisher+batch+affine+apart": ("none", "none"),
        "fisher+price+affine": ("none", "none"),
    }
    of_floats = jobs()
    moe = moe_model("mixtral")
    for name, wanted in expected.items():
        profile = of_floats.profile(moe, parse_method(name), calibration)
        assert profile is not None
        assert (profile.redistribution, profile.correction) == wanted
    plain = parse_method("uniform+affine")
    assert of_floats.profile(moe, plain, calibration) is None
    assert {path.name for path in tmp_path.iterdir()} == {
        "profile-fisher-sequence-none-0.json",
        "profile-fisher-sequence-affine-0.json",
        "profile-fisher-sequence-gain-0.json",
        "profile-fisher-none-none-0.json",
    }
    methods = [parse_method(name) for name in (*expected, "uniform+affine", "kl")]
    found = of_floats.sensitivities(methods, calibration)
    said = [(each.redistribution, each.correction) for each in found]
    assert said == list(dict.fromkeys(expected.values()))
    assert jobs(WeightType("int4", "gptq")).sensitivities(methods, calibration) == ()


def test_a_cell_depends_on_the_correction_it_was_planned_with(
    jobs: Callable[..., BudgetJobs], calibration: CalibrationSet
) -> None:
    names = ["kl+batch+affine", "kl+batch+affine+apart", "kl+batch+gain", "kl+price+affine"]
    keys = [jobs().key(parse_method(name), "0.5", calibration) for name in names]
    assert [key.count('"affine"') for key in keys] == [2, 1, 0, 1]


def test_a_cell_depends_on_the_type_of_its_weights(
    jobs: Callable[..., BudgetJobs], calibration: CalibrationSet
) -> None:
    uniform = parse_method("uniform")
    types = [FLOAT32, WeightType("int8"), WeightType("int4"), WeightType("int4", "gptq")]
    keys = [jobs(weights).key(uniform, "0.5", calibration) for weights in types]
    assert len(set(keys)) == len(types)
    by_text = [bool(json.loads(key)[2]) for key in keys]
    assert by_text == [False, False, False, True]
