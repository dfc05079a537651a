"""The disk that a compile says it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.package.space import _SMALL_FILES, needed_space
from alloc_moe.compiler.records import CompileOptions, TargetOptions


def test_the_disk_has_to_hold_all_experts_in_8_bits(moe_model: Callable[[str], MoeModel]) -> None:
    given = CompileOptions("model", "out.onnx", "0.5")
    four, mixed, eight = (
        needed_space(moe_model("olmoe"), dataclasses.replace(given, target=target))
        for target in (
            TargetOptions("int4"),
            TargetOptions("int4", mixed_bits=True),
            TargetOptions("int8"),
        )
    )
    assert four < mixed == eight


def test_the_disk_holds_both_widths_of_values_chosen_for_layers_on_disk(
    checkpoint: Callable[[str], Path],
) -> None:
    moe = load_model(str(checkpoint("olmoe")), offload="always")
    given = CompileOptions("model", "out.onnx", "0.5")
    nearest, both = (
        needed_space(moe, dataclasses.replace(given, target=target))
        for target in (
            TargetOptions("int4", mixed_bits=True),
            TargetOptions("int4", mixed_bits=True, rounding="gptq"),
        )
    )
    in_memory = dataclasses.replace(moe, offloading=None)
    alone = needed_space(in_memory, dataclasses.replace(given, target=TargetOptions("int4")))
    assert both - nearest == pytest.approx(alone - _SMALL_FILES, abs=2)
