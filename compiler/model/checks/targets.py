"""What of a target a model's layers can't have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.model.architectures import kinds_with_states

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from alloc_moe.compiler.records import TargetOptions


def check_target(config: PreTrainedConfig, target: TargetOptions, *, program: bool = False) -> None:
    """Raise UnsupportedModelError if a model with states of fixed size can't have a target.

    ``program`` is whether it is one of torch's.
    """
    kinds = kinds_with_states(config)
    if not kinds:
        return
    for fault, problem in (
        (program, "aren't carried by torch's programs yet. Choose an output that ends in .onnx"),
        (target.device != "cpu", "have no operators on CUDA yet. Use --device cpu"),
        (
            target.dtype in ("float16", "bfloat16"),
            "are float32 on the CPU. Use --dtype float32, int8 or int4",
        ),
        (target.cache == "int8", "can't be rounded to 8 bits. Use --cache float32"),
    ):
        if fault:
            raise UnsupportedModelError(
                f"{config.model_type} has layers of type {' and '.join(kinds)}, whose states "
                f"{problem}."
            )
