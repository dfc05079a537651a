"""How large what experts add is for one token, in the plan's JSON: a linear map per layer."""

from __future__ import annotations

import base64
import binascii
import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LIMIT = 2.5
"""The greatest logarithm of a factor, up or down: a token's size is 0.08 to 12 times the mean."""
_STORED = np.dtype("<f2")


@dataclass(frozen=True)
class TokenSizes:
    """What a token's hidden state multiplies the sizes of a layer's experts by.

    Where h [hidden] enters the experts, that is ``exp(clip(h A + b))`` [experts], the logarithm
    clipped to `LIMIT` up and down. ``values`` are A [hidden, experts], row by row, and b [experts],
    little-endian float16 in base64: so the plan says exactly what the graph computes.
    """

    hidden: int
    values: str

    @classmethod
    def of(cls, weights: NDArray[np.floating], bias: NDArray[np.floating]) -> TokenSizes:
        """Return A and b as they are stored, rounded to float16.

        Raises:
            ValueError: A number is beyond float16's.
        """
        with np.errstate(over="ignore"):
            stored = np.concatenate([weights, bias[None]]).astype(_STORED)
        if not np.isfinite(stored).all():
            raise ValueError("A weight of token sizes is beyond float16.")
        return cls(len(weights), base64.b64encode(stored.tobytes()).decode())

    def fits(self, experts: int) -> bool:
        """Return whether the values are as many finite numbers as a layer of `experts` needs."""
        try:
            numbers = np.frombuffer(base64.b64decode(self.values, validate=True), _STORED)
        except (binascii.Error, ValueError):
            return False
        return numbers.size == (self.hidden + 1) * experts and bool(np.isfinite(numbers).all())

    @functools.cached_property
    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A [hidden, experts] and b [experts] in float32: decoded once, as every call asks."""
        flat = np.frombuffer(base64.b64decode(self.values), _STORED).astype(np.float32)
        rows = flat.reshape(self.hidden + 1, -1)
        return rows[:-1], rows[-1]
