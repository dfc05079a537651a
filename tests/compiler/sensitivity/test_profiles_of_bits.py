"""Saved profiles that have costs of experts in several widths."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.errors import ProfileError
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import SensitivityProfile
from alloc_moe.compiler.rounding.formats import choose_formats, mixed_formats
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.passes.blockwise import BlockFormat

Given: TypeAlias = tuple[MoeModel, tuple[tuple[BlockFormat, ...], ...]]


@pytest.fixture(scope="module")
def given(moe_model: Callable[[str], MoeModel]) -> Given:
    """Return a model in floats, and what its experts may be stored in."""
    moe = moe_model("olmoe")
    return moe, mixed_formats(choose_formats(moe.checkpoint, "int4"))


def test_a_profile_of_one_width_is_not_used_for_two(
    given: Given, calibration: CalibrationSet, tmp_path: Path
) -> None:
    moe, formats = given
    path = tmp_path / "p.json"
    measure_sensitivity(moe, calibration, metric="output", path=path)
    with pytest.raises(ProfileError, match=r"the bits of experts \(there none, now 4/8\) changed"):
        measure_sensitivity(moe, calibration, metric="output", formats=formats, path=path)


def test_costs_of_the_wrong_number_are_reported(
    given: Given, calibration: CalibrationSet, tmp_path: Path
) -> None:
    moe, formats = given
    path = tmp_path / "p.json"
    measure = functools.partial(
        measure_sensitivity, moe, calibration, metric="output", formats=formats
    )
    profile = measure()
    short = tuple(row[:-1] for row in profile.costs if row is not None)
    path.write_text(dataclasses.replace(profile, costs=short).to_json())
    with pytest.raises(ProfileError, match="its costs don't fit its layers"):
        measure(path=path)


def test_files_of_earlier_versions_have_no_bits(tmp_path: Path) -> None:
    old = SensitivityProfile(
        "kl", "m", "c", 8, 4, 0, ("l",), (2,), ((1.0, 0.0),), 1.0, 0.0, expert_sizes=(None,)
    )
    data = json.loads(old.to_json())
    del data["bits"]
    assert SensitivityProfile.from_json(json.dumps(data), path=tmp_path) == old
    assert old.widths == 1
