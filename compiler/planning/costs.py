"""What k experts use up in each layer: activations, bytes of weights, or milliseconds.

The prices of the allocation: an activation budget weighs the experts of all layers alike, but where
layers differ in shape, or where a batch's tokens share experts, neither their bytes nor their time
are proportional to k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alloc_moe.compiler.errors import CostError
from alloc_moe.compiler.planning.shapes import ExpertShape, distinct_experts
from alloc_moe.compiler.records import CostKind, Device
from alloc_moe.compiler.rounding.formats import BITS, BLOCK
from alloc_moe.passes.blockwise import BlockFormat

if TYPE_CHECKING:
    from alloc_moe.runtime.console import Console

_UNITS: dict[CostKind, str] = {
    "activations": "activations per token",
    "bytes": "bytes",
    "latency": "ms",
}
_BITS_PER_WEIGHT = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0} | {
    dtype: BlockFormat(bits, BLOCK).bits_per_weight for dtype, bits in BITS.items()
}


@dataclass(frozen=True)
class CostTable:
    """What the routed experts of a decode step of ``batch`` tokens use up.

    ``prices[l][k - 1]``, in ``unit``, is what k experts per token use up in MoE layer l; it need
    not rise with k where it was measured. Where the bits of weights are chosen too, come first the
    prices of all k in the fewest bits, then in the next; ``trained`` then has what each layer uses
    up as trained, in the bits of ``dtype``.
    """

    kind: CostKind
    unit: str
    batch: int
    dtype: str
    prices: tuple[tuple[float, ...], ...]
    trained: tuple[float, ...] | None = None

    @property
    def original(self) -> Fraction:
        """What the model as trained uses up: the sum of every layer's last price."""
        last = (row[-1] for row in self.prices) if self.trained is None else self.trained
        return sum(map(Fraction, last), Fraction(0))

    @property
    def cheapest(self) -> Fraction:
        """What no plan is below."""
        return sum((Fraction(min(row)) for row in self.prices), Fraction(0))

    def total(self, allocation: Sequence[int]) -> Fraction:
        """Return the exact sum of the prices of a plan."""
        pairs = zip(self.prices, allocation, strict=True)
        return sum((Fraction(row[k - 1]) for row, k in pairs), Fraction(0))

    def to_plan(self, allocation: Sequence[int], limit: Fraction) -> dict[str, Any]:
        """Return what the plan says of its cost."""
        return {
            "kind": self.kind,
            "unit": self.unit,
            "batch": self.batch,
            "dtype": self.dtype,
            "limit": float(limit),
            "planned": float(self.total(allocation)),
            "original": float(self.original),
        }


def measure_costs(
    kind: CostKind,
    shapes: Sequence[ExpertShape],
    *,
    dtype: str,
    batch: int = 1,
    device: Device = "cpu",
    path: Path | None = None,
    console: Console | None = None,
) -> CostTable:
    """Return the price of every k in every layer.

    Args:
        kind: ``activations``, where k experts cost k; ``bytes`` of expert weights that a decode
            step reads; or ``latency``, milliseconds of the layer's MoE operator measured here.
        shapes: Of each MoE layer.
        dtype: Type of the artifact's weights.
        batch: Tokens in a decode step. With more than one, tokens share experts: see
            `distinct_experts`. What one token activates doesn't depend on it.
        device: Where the artifact will run.
        path: Where measured latencies are kept and looked up; None measures anew.
        console: Where progress is told.

    Raises:
        CostError: The kind can't be told for this type of weights or this device.
    """
    price: Callable[[ExpertShape], tuple[float, ...]]
    if kind == "latency":
        from alloc_moe.compiler.planning.latency import measure_latencies

        if device != "cpu":
            raise CostError(
                f"Latency is measured on the CPU, but the artifact is for {device}. "
                "Use --cost bytes, which decode on a GPU is bound by."
            )
        latencies = measure_latencies(shapes, dtype=dtype, batch=batch, path=path, console=console)
        price = latencies.__getitem__
    elif kind == "bytes":

        def price(shape: ExpertShape) -> tuple[float, ...]:
            return _bytes_read(shape, _bits_per_weight(dtype), batch=batch)

    else:

        def price(shape: ExpertShape) -> tuple[float, ...]:
            return tuple(float(k) for k in range(1, shape.experts_per_token + 1))

    prices = tuple(price(shape) for shape in shapes)
    return CostTable(kind, _UNITS[kind], batch, dtype, prices)


def mixed_costs(
    shapes: Sequence[ExpertShape],
    formats: Sequence[Sequence[BlockFormat]],
    *,
    dtype: str,
    bits: int,
    batch: int = 1,
) -> CostTable:
    """Return the bytes of expert weights that a decode step reads, at every k in every format.

    Args:
        shapes: Of each MoE layer.
        formats: What each layer's weights may be stored in.
        dtype: What the artifact's other weights are.
        bits: Those of one of the formats: what a budget is a share of is the full model in these.
        batch: As for `measure_costs`.
    """
    rows, trained = [], []
    for shape, choices in zip(shapes, formats, strict=True):
        by_bits = {
            form.bits: _bytes_read(shape, form.bits_per_weight, batch=batch) for form in choices
        }
        rows.append(tuple(price for row in by_bits.values() for price in row))
        trained.append(by_bits[bits][-1])
    return CostTable("bytes", _UNITS["bytes"], batch, dtype, tuple(rows), tuple(trained))


def _bits_per_weight(dtype: str) -> float:
    if dtype not in _BITS_PER_WEIGHT:
        raise CostError(
            f"The bytes of {dtype} weights aren't known: only those of "
            f"{', '.join(_BITS_PER_WEIGHT)} are. Use --cost activations."
        )
    return _BITS_PER_WEIGHT[dtype]


def _bytes_read(shape: ExpertShape, bits_per_weight: float, *, batch: int) -> tuple[float, ...]:
    nbytes = Fraction(bits_per_weight) * shape.parameters / 8
    ks = range(1, shape.experts_per_token + 1)
    return tuple(float(distinct_experts(shape.experts, k, batch) * nbytes) for k in ks)
