"""Numbers that a model computed, or that a caller gives, must be numbers."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from alloc_moe.runtime.errors import ArtifactError


def check_finite(values: ArrayLike, what: str) -> None:
    """Raise ArtifactError if a value is NaN or infinite.

    Args:
        values: Any numbers.
        what: What computed them, for the message: ``The model computed logits``.
    """
    if not np.isfinite(values).all():
        raise ArtifactError(
            f"{what} that are no finite numbers. If it was compiled to float16, its values may be "
            "too large for that: compile it to float32 or bfloat16. Else its weights are damaged."
        )


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number in this range that 32 bits hold, and no truth value."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and least <= value < 1 << 31


def is_number(value: Any) -> bool:
    """Whether a value is one number, NaN and infinity among them, and no truth value."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
