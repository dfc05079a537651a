"""Corrections as weights: what they make of the parameters of experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Correction

ADDED_BIAS = "alloc_moe_down_bias"
"""The bias [experts, hidden] that a correction adds to experts that have none."""

Change = Callable[[np.ndarray | None], np.ndarray]
"""From a parameter in float32, None if the model lacks it, to what stands for it."""


def changed_weights(moe: MoeModel, corrections: Sequence[Correction | None]) -> dict[str, Change]:
    """Return what corrections make of parameters, by name.

    Args:
        moe: The model.
        corrections: One per MoE layer, None where there is none.

    Returns:
        Changes of ``down_proj``, of its bias where experts have one, and of `ADDED_BIAS` where they
        have none and a correction shifts them.
    """
    changes: dict[str, Change] = {}
    for layer, correction in zip(moe.layers, corrections, strict=False):
        if correction is None:
            continue
        experts = moe.model.get_submodule(layer.experts_name)
        rows = correction.scale if experts.is_transposed else correction.scale[:, None]
        prefix = f"{layer.experts_name}."
        changes[f"{prefix}down_proj"] = functools.partial(_scaled, rows, None)
        if experts.has_bias or correction.bias is not None:
            name = "down_proj_bias" if experts.has_bias else ADDED_BIAS
            bias = functools.partial(_scaled, correction.scale, correction.bias)
            changes[f"{prefix}{name}"] = bias
    return changes


def _scaled(scale: np.ndarray, added: np.ndarray | None, weights: np.ndarray | None) -> np.ndarray:
    scaled = 0 if weights is None else weights * scale
    return np.asarray(scaled if added is None else scaled + added)
