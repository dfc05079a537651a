"""What a step program is made of, and its JSON.

A program computes one new token for each of T sequences. Every value is a buffer [T, width] named
by a string; weights are named by their initializers. A field that is None is left out of the JSON.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from alloc_moe.passes.step.parts import (
    ExpertFormats,
    Format,
    Keep,
    Norm,
    Rotary,
    Router,
    Shared,
    SharedKeys,
    Slice,
)

FORMAT = 1
LOGITS = "logits"
"""The buffer that the last operation writes."""
ROUTED = "routed"
"""What a route's output begins with: it is no buffer of numbers, but kept experts and weights."""


@dataclass(frozen=True)
class Embed:
    """Rows of ``weight`` [V, H] at the new tokens."""

    op: ClassVar[str] = "embed"
    weight: str
    out: str
    n: int
    format: Format | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Linear:
    """[norm](x) @ W^T (+ bias) (+ residual), of W [n, k]."""

    op: ClassVar[str] = "linear"
    x: str
    weight: str
    out: str
    n: int
    k: int
    bias: str | None = None
    format: Format | None = None
    norm: Norm | None = None
    residual: str | None = None
    x_offset: int | None = None


@dataclass(frozen=True)
class RmsNorm:
    """An RMS norm of n columns, or of each ``size`` of them."""

    op: ClassVar[str] = "norm"
    x: str
    weight: str
    eps: float
    out: str
    n: int
    offset: int = 0
    size: int | None = None
    x_offset: int | None = None


@dataclass(frozen=True)
class Attention:
    """Appends keys and values to the cache of ``layer``, and attends to all of it."""

    op: ClassVar[str] = "attention"
    layer: int
    q: Slice
    k: Slice
    v: Slice
    out: str
    heads: int
    kv_heads: int
    size: int
    scale: float
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rotary: Rotary | None = None
    softcap: float | None = None
    k_shared: SharedKeys | None = None


@dataclass(frozen=True)
class Route:
    """Chooses experts for [norm](x), which ``normed`` receives."""

    op: ClassVar[str] = "route"
    x: str
    weight: str
    out: str
    experts: int
    hidden: int
    router: Router
    keep: Keep
    weights: str
    bias: str | None = None
    format: Format | None = None
    norm: Norm | None = None
    normed: str | None = None


@dataclass(frozen=True)
class Experts:
    """The weighted sum of the kept experts (+ shared expert) (+ residual)."""

    op: ClassVar[str] = "experts"
    x: str
    routing: str
    gate_up: str
    down: str
    out: str
    n: int
    intermediate: int
    gate_up_bias: str | None = None
    down_bias: str | None = None
    format: ExpertFormats | None = None
    activation: str = "silu"
    residual: str | None = None
    shared: Shared | None = None


@dataclass(frozen=True)
class SwiGlu:
    """silu(gate) * up: the halves of x, or x and y."""

    op: ClassVar[str] = "swiglu"
    x: str
    out: str
    n: int
    y: str | None = None


@dataclass(frozen=True)
class Add:
    """x + y."""

    op: ClassVar[str] = "add"
    x: str
    y: str
    out: str
    n: int


@dataclass(frozen=True)
class ScaleRows:
    """x * sigmoid(gate), gate being [T, 1]."""

    op: ClassVar[str] = "scale_rows"
    x: str
    gate: str
    out: str
    n: int


@dataclass(frozen=True)
class AddBias:
    """x + bias: only until a product takes it over."""

    op: ClassVar[str] = "add_bias"
    x: str
    bias: str
    out: str
    n: int


Op = Embed | Linear | RmsNorm | Attention | Route | Experts | SwiGlu | Add | ScaleRows | AddBias


@dataclass(frozen=True)
class CacheLayer:
    """One layer's cache: keys [T, heads, length, key_size], values alike."""

    layer: int
    heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True)
class StepProgram:
    """One decode step."""

    dtype: str
    hidden: int
    vocabulary: int
    context_length: int | None
    kv: tuple[CacheLayer, ...]
    ops: tuple[Op, ...]

    def to_json(self) -> str:
        """Return the program as one line of JSON."""
        return json.dumps({"format": FORMAT, **_data(self)})


@dataclass(frozen=True)
class Reason:
    """Why a graph has no step program, as the end of a sentence."""

    text: str


def reads(op: Op) -> list[str]:
    """Return the buffers that an operation reads."""
    match op:
        case Embed():
            return []
        case Attention():
            parts = [op.q, op.k, op.v, op.k_shared]
            return [part.buffer for part in parts if part is not None]
        case Experts():
            found = [op.x, op.routing, op.residual]
        case Linear():
            found = [op.x, op.residual]
        case SwiGlu() | Add():
            found = [op.x, op.y]
        case ScaleRows():
            found = [op.x, op.gate]
        case _:
            found = [op.x]
    return [name for name in found if name is not None]


def writes(op: Op) -> list[str]:
    """Return the buffers that an operation writes."""
    also = op.normed if isinstance(op, Route) else None
    return [op.out] if also is None else [op.out, also]


def _data(value: Any) -> Any:  # any field of any record
    if isinstance(value, tuple):
        return [_data(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    router = fields.pop("router", None)
    found = {name: _data(item) for name, item in fields.items() if item is not None}
    if router is not None:
        found |= _data(router)
    return {"op": value.op, **found} if hasattr(value, "op") else found
