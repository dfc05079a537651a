"""Ways to spend the bytes that a token reads: what ``alloc-sweep --targets`` compares."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alloc_moe.compiler.errors import SweepError
from alloc_moe.compiler.records import (
    CompileOptions,
    CorrectionMode,
    Goal,
    PlanOptions,
    Redistribution,
    TargetOptions,
)
from alloc_moe.compiler.sweep.models import WeightType

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Way:
    """A way to spend bytes, which `alloc-compile` makes artifacts of by the ``flags``.

    With ``plain`` it has no plans for a target: it is one k for all layers, every one that fits.
    """

    name: str
    flags: str
    weights: WeightType
    redistribution: Redistribution
    correction: CorrectionMode = "affine"
    plain: bool = False
    token_sizes: bool | None = None  # None: wherever they can be

    @property
    def goes_by_text(self) -> bool:
        """Whether anything depends on the calibration text, and so on its seed."""
        return self.weights.goes_by_text or not self.plain

    def options(self, model: str, most: float) -> CompileOptions:
        """Return what `alloc-compile` is asked for by the flags, and bytes at most."""
        weights = self.weights
        return CompileOptions(
            model,
            "",
            "1.0",
            goal=Goal("bytes", most),
            plan=PlanOptions(
                self.redistribution,
                correction=self.correction,
                allocation="uniform" if self.plain else "sensitivity",
                cost="bytes" if weights.mixed_bits else "activations",
                dial=False,
            ),
            token_sizes=self.token_sizes,
            target=TargetOptions(
                weights.dtype, mixed_bits=weights.mixed_bits, rounding=weights.rounding
            ),
        )


_INT4, _INT8 = WeightType("int4", "gptq"), WeightType("int8")
_PLAIN = "--allocation uniform --redistribute none --correct none"
WAYS = {
    "int4-price": Way("int4, price", "--dtype int4", _INT4, "price"),
    "int4-one-size": Way(
        "int4, price, one size",
        "--dtype int4 --no-token-sizes",
        _INT4,
        "price",
        token_sizes=False,
    ),
    "int4-threshold": Way(
        "int4, threshold", "--dtype int4 --redistribute threshold", _INT4, "threshold"
    ),
    "int4-k": Way("int4, uniform k", f"--dtype int4 {_PLAIN}", _INT4, "none", "none", plain=True),
    "int8-price": Way("int8, price", "--dtype int8", _INT8, "price"),
    "int8-k": Way("int8, uniform k", f"--dtype int8 {_PLAIN}", _INT8, "none", "none", plain=True),
    "mixed-int4": Way(
        "mixed bits, rest int4",
        "--dtype int4 --mixed-bits",
        WeightType("int4", "gptq", mixed_bits=True),
        "threshold",
    ),
    "mixed-int8": Way(
        "mixed bits, rest int8",
        "--dtype int8 --mixed-bits",
        WeightType("int8", "gptq", mixed_bits=True),
        "threshold",
    ),
}
"""Ways by the names that the command takes; those of one type of weights one after another."""


def parse_ways(names: Sequence[str]) -> tuple[Way, ...]:
    """Return the ways of these names, in the order of `WAYS`.

    Raises:
        SweepError: There is no such way.
    """
    for name in names:
        if name not in WAYS:
            near = difflib.get_close_matches(name, WAYS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(WAYS)}."
            raise SweepError(f"{name!r} is no way to spend bytes. {hint}")
    return tuple(way for name, way in WAYS.items() if name in names)
