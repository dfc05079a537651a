"""Experts that every token has: find one among products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alloc_moe.passes.step.parts import GateUp, GateUpFormats, Shared, SharedFormats
from alloc_moe.passes.step.records import Linear, Op, ScaleRows, SwiGlu, writes


def shared_expert(
    ops: Sequence[Op], readers: Mapping[str, int], buffer: str, x: str
) -> Shared | None:
    """Return the expert of `x` whose output `buffer` is, None if it is something else."""
    top, gate = _written(ops, readers, buffer), None
    if isinstance(top, ScaleRows):
        scale = _plain(_written(ops, readers, top.gate), x)
        if scale is None or scale.n != 1 or scale.format is not None:
            return None
        gate, top = scale.weight, _written(ops, readers, top.x)
    down = top if isinstance(top, Linear) else None
    glu = None if down is None else _written(ops, readers, down.x)
    if down is None or not isinstance(glu, SwiGlu) or _plain(down, glu.out) is None:
        return None
    given = [glu.x] if glu.y is None else [glu.x, glu.y]
    parts = [_plain(_written(ops, readers, name), x) for name in given]
    first, last = parts[0], parts[-1]
    if first is None or last is None:
        return None
    weights, formats = first.weight, first.format
    if glu.y is None:
        return Shared(weights, down.weight, glu.n, gate, _formats(formats, down))
    pair = GateUp(first.weight, last.weight)
    both = GateUpFormats(first.format, last.format) if first.format or last.format else None
    return Shared(pair, down.weight, glu.n, gate, _formats(both, down))


def _formats(gate_up: object, down: Linear) -> SharedFormats | None:
    if gate_up is None and down.format is None:
        return None
    return SharedFormats(gate_up, down.format)  # type: ignore[arg-type]


def _written(ops: Sequence[Op], readers: Mapping[str, int], buffer: str) -> Op | None:
    """Return the operation that writes a buffer which one other operation reads."""
    found = next((op for op in ops if buffer in writes(op)), None)
    return found if readers[buffer] == 1 else None


def _plain(op: Op | None, x: str) -> Linear | None:
    """Return a product of all of `x`, and of nothing else."""
    if not isinstance(op, Linear) or op.x != x:
        return None
    extras = (op.bias, op.norm, op.residual, op.x_offset)
    return op if all(extra is None for extra in extras) else None
