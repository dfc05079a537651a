"""Fewer launches: norms, biases, residuals and shared experts join what they belong to."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from alloc_moe.passes.step.parts import Norm, Slice
from alloc_moe.passes.step.records import (
    LOGITS,
    Add,
    AddBias,
    Attention,
    Experts,
    Linear,
    Op,
    RmsNorm,
    Route,
    reads,
    writes,
)
from alloc_moe.passes.step.shared import shared_expert


def fuse(ops: Sequence[Op]) -> list[Op]:
    """Return what computes the same in fewer operations; the last one writes the logits."""
    found = live(ops)
    for step in (_biases, _head_norms, _norms, _shared_experts, _residuals):
        found = live(step(found))
    return found


def live(ops: Sequence[Op]) -> list[Op]:
    """Return the operations that the logits need, or the cache does, in their order."""
    needed, kept = {LOGITS}, []
    for op in reversed(ops):
        if isinstance(op, Attention) or needed.intersection(writes(op)):
            kept.append(op)
            needed.update(reads(op))
    return kept[::-1]


def _biases(ops: list[Op]) -> list[Op]:
    """Add a bias where the product is made."""
    readers, found = _readers(ops), list(ops)
    for add in [op for op in ops if isinstance(op, AddBias)]:
        at = _writer(found, add.x)
        product = found[at]
        if isinstance(product, Linear) and product.bias is None and readers[add.x] == 1:
            found[at] = dataclasses.replace(product, bias=add.bias, out=add.out)
            found.remove(add)
    return found


def _head_norms(ops: list[Op]) -> list[Op]:
    """Norm queries and keys where they are rotated."""
    readers, found = _readers(ops), list(ops)
    for at, op in enumerate(ops):
        if isinstance(op, Attention):
            q, q_norm = _unnormed(ops, readers, op.q, op.heads, op.size)
            k, k_norm = _unnormed(ops, readers, op.k, op.kv_heads, op.size)
            found[at] = dataclasses.replace(op, q=q, k=k, q_norm=q_norm, k_norm=k_norm)
    return found


def _unnormed(
    ops: Sequence[Op], readers: Mapping[str, int], given: Slice, heads: int, size: int
) -> tuple[Slice, Norm | None]:
    """Return queries or keys before their norm, and the norm, over all or each of the heads."""
    norm = ops[_writer(ops, given.buffer)]
    if not isinstance(norm, RmsNorm) or readers[norm.out] != 1:
        return given, None
    whole = norm.size is None
    if not whole and norm.size != size:
        return given, None
    record = Norm(norm.weight, norm.eps, norm.offset, whole and heads > 1)
    return Slice(norm.x, norm.x_offset or 0), record


def _norms(ops: list[Op]) -> list[Op]:
    """Norm where a product or a router reads; a router passes the normed values on."""
    found = list(ops)
    for norm in [op for op in ops if isinstance(op, RmsNorm)]:
        users = [op for op in found if norm.out in reads(op)]
        routes = [op for op in users if isinstance(op, Route)]
        one = norm.size is None
        record = Norm(norm.weight, norm.eps, norm.offset)
        at = found.index(norm)
        if one and norm.x_offset is None and len(routes) == 1:
            (route,) = routes
            normed = norm.out if len(users) > 1 else None
            fused = dataclasses.replace(route, x=norm.x, norm=record, normed=normed)
            found.remove(route)
            found[at] = fused
        elif one and all(_takes_norm(op, norm.out) for op in users):
            found = [
                dataclasses.replace(op, x=norm.x, norm=record, x_offset=norm.x_offset)
                if isinstance(op, Linear) and op.x == norm.out
                else op
                for op in found
                if op is not norm
            ]
    return found


def _takes_norm(op: Op, buffer: str) -> bool:
    return isinstance(op, Linear) and op.x == buffer and op.x_offset is None


def _shared_experts(ops: list[Op]) -> list[Op]:
    """Run experts that every token has together with the chosen ones."""
    readers, found = _readers(ops), list(ops)
    for add in [op for op in ops if isinstance(op, Add)]:
        for routed, other in ((add.x, add.y), (add.y, add.x)):
            experts = found[_writer(found, routed)]
            if not isinstance(experts, Experts) or experts.shared or readers[routed] != 1:
                continue
            shared = shared_expert(found, readers, other, experts.x)
            if shared is not None:
                at = found.index(experts)
                found[at] = dataclasses.replace(experts, shared=shared, out=add.out)
                found.remove(add)
                break
    return found


def _residuals(ops: list[Op]) -> list[Op]:
    """Add a residual where the last of the two terms is made."""
    readers, found = _readers(ops), list(ops)
    for add in [op for op in ops if isinstance(op, Add)]:
        terms = sorted((add.x, add.y), key=lambda name: _writer(found, name))
        at = _writer(found, terms[1])
        last = found[at]
        alone = readers[last.out] == 1 and add.x != add.y
        if isinstance(last, Linear | Experts) and last.residual is None and alone:
            found[at] = dataclasses.replace(last, residual=terms[0], out=add.out)
            found.remove(add)
    return found


def _readers(ops: Sequence[Op]) -> Counter[str]:
    """Return how often each buffer is read."""
    return Counter(name for op in ops for name in reads(op))


def _writer(ops: Sequence[Op], buffer: str) -> int:
    """Return the index of the operation that writes a buffer."""
    return next(at for at, op in enumerate(ops) if buffer in writes(op))
