"""The disk that a compile takes, told before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alloc_moe.compiler.model.offloading import weights_bytes
from alloc_moe.compiler.rounding.formats import BITS
from alloc_moe.compiler.sensitivity.token_sizes.fitting import FURTHER

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import CompileOptions

_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.25, "int4": 0.75}
_OVERHEAD = 1.02  # what is in the graph besides weights
_SMALL_FILES = 64 << 20  # graph, tokenizer, profile


def needed_space(moe: MoeModel, options: CompileOptions) -> int:
    """Return the bytes of disk that a compile takes: weights, a little more, states it saves.

    Of an offloaded model the rounded weights are kept too, until the artifact is complete.
    """
    # With mixed bits all experts of a layer may be stored in 8, however few of them run.
    dtype = "int8" if options.target.mixed_bits else options.target.dtype
    each = _BYTES[dtype]
    if moe.offloading is not None and dtype in BITS:
        each *= 2
        if options.target.mixed_bits and options.target.rounding == "gptq":
            each += _BYTES["int4"]  # values were chosen for this width too
    weights = weights_bytes(moe.checkpoint.skeleton) // 4 * each
    states = 0
    if moe.offloading is not None and options.plan.allocation == "sensitivity":
        config = moe.config.get_text_config()
        layers = config.num_hidden_layers + 2  # what enters each, and gradients on the way back
        tokens = options.calibration.tokens * (1 + FURTHER if options.token_sizes else 1)
        states = layers * tokens * config.hidden_size * 4
    return int(weights * _OVERHEAD) + max(states, _SMALL_FILES)
