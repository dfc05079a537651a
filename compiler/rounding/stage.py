"""Model and formats -> the model with rounded weights, by the rounding that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alloc_moe.compiler.rounding.calibrated import calibrated
from alloc_moe.compiler.rounding.weights import quantized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Quantization, Rounding
    from alloc_moe.passes.blockwise import BlockFormat
    from alloc_moe.runtime.console import Console


def round_model(
    moe: MoeModel,
    chosen: Quantization | None,
    rounding: Rounding,
    calibration: CalibrationSet,
    console: Console,
    *,
    widths: Sequence[Sequence[BlockFormat]] = (),
) -> MoeModel:
    """Return the model with weights rounded to the formats `chosen`, if there are any.

    Args:
        moe: Its weights are changed in place.
        chosen: None leaves the model as it is.
        rounding: ``nearest`` doesn't look at the calibration text.
        calibration: What enters the products is measured on it.
        console: Where progress is told.
        widths: Formats to choose each MoE layer's experts from, if a plan will; the experts are
            floats until `with_expert_formats` rounds them.
    """
    if chosen is None:
        return moe
    if rounding == "gptq":
        return calibrated(moe, chosen, calibration, widths=widths, console=console)
    with console.step(f"Rounding weights to {chosen.dtype}"):
        return quantized(moe, chosen, round_experts=not widths)
