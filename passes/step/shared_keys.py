"""Keys that all heads have in common are read by each, and not multiplied out for all."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from alloc_moe.passes.step.parts import SharedKeys
from alloc_moe.passes.step.records import Attention, Linear, Op, reads, writes

_MOST_SHARED = 256  # elements: a larger weight is none that repeats, and isn't looked at


def share_keys(ops: Sequence[Op], weight: Callable[[str], NDArray[np.generic]]) -> list[Op]:
    """Return operations without products that repeat a row of keys for every head.

    `ExpandLatentsPass` makes such a product: its weight [n, k] has ones and zeros. A head's first
    k elements are the row's, and other keys and values get zeros added.

    Args:
        ops: A step, fused.
        weight: Gives a weight's values.
    """
    found: dict[int, Op] = dict(enumerate(ops))
    readers = Counter(name for op in ops for name in reads(op))
    writers = {name: at for at, op in enumerate(ops) for name in writes(op)}
    for at, op in enumerate(ops):
        if not isinstance(op, Attention) or op.k_norm is not None:
            continue
        source = writers[op.k.buffer]
        repeated = ops[source]
        if not isinstance(repeated, Linear) or repeated.residual is None:
            continue
        if readers[repeated.out] != 2 or op.v.buffer != repeated.out or repeated.format:
            continue
        plain = repeated.norm is None and repeated.bias is None and repeated.k <= _MOST_SHARED
        if plain and _repeats(weight(repeated.weight), op):
            before = repeated.residual
            shared = SharedKeys(repeated.x, repeated.x_offset or 0, repeated.k)
            k, v = (dataclasses.replace(part, buffer=before) for part in (op.k, op.v))
            found[at] = dataclasses.replace(op, k=k, v=v, k_shared=shared)
            del found[source]
    return list(found.values())


def _repeats(given: NDArray[np.generic], op: Attention) -> bool:
    """Whether a weight adds its input to the first elements of each head's keys, and no more."""
    n, k = given.shape
    expected = np.zeros((n, k), given.dtype)
    for head in range(op.kv_heads):
        first = op.k.offset + head * op.size
        expected[first : first + k] = np.eye(k, dtype=given.dtype)
    return k <= op.size and bool(np.array_equal(given, expected))
