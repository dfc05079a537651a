"""Numbers that a model computed must be numbers."""

from __future__ import annotations

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
