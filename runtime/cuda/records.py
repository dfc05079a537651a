"""What is planned for the device: launches and copies; and what plans depend on, and addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Program = Mapping[str, Any]
Operation = Mapping[str, Any]


@dataclass(frozen=True)
class Launch:
    """One kernel: a C++ expression, its grid, threads per block, bytes of dynamic shared memory.

    Arguments are ctypes values.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Places:
    """Addresses on the device that all plans need.

    Args:
        weight: Gives that of an initializer.
        buffer: Gives that of so many bytes by a name, the same for the same name.
        zeros: The same, of bytes that were set to zero.
        router: Gives that of a route operation's constants.
        transposed: Gives that of an initializer of so many columns, transposed.
    """

    weight: Callable[[str], int]
    buffer: Callable[[str, int], int]
    zeros: Callable[[str, int], int]
    router: Callable[[Operation], int]
    transposed: Callable[[str, int], int]


@dataclass(frozen=True)
class Memory(Places):
    """Addresses on the device for a step.

    Args:
        keys: Of the cache, by layer: [tokens, heads, capacity, size].
        values: The same.
        ids: Token ids [tokens] int64.
        lengths: Positions that each sequence has had [tokens] int32.
        real: Whether each token is no padding [tokens] int32.
    """

    keys: Mapping[int, int]
    values: Mapping[int, int]
    ids: int
    lengths: int
    real: int


@dataclass(frozen=True)
class Shape:
    """What launches depend on besides the program.

    ``tokens`` sequences of one new token each, room for ``capacity`` positions of each, the GPU's
    number of ``multiprocessors``, bytes of an ``element``.
    """

    tokens: int
    capacity: int
    multiprocessors: int
    element: int


@dataclass(frozen=True)
class Copy:
    """Bytes from one place on the device to another."""

    to: int
    source: int
    size: int


@dataclass(frozen=True)
class Rows:
    """A call's tokens: ``sequences`` of up to ``width`` new ones each, right-padded.

    Addresses on the device: ``ids`` [sequences, width] int64, ``lengths`` and ``counts``
    [sequences] int32, which are the positions that each has had and its new ones; ``keys`` and
    ``values`` by layer, [sequences, heads, capacity, size].
    """

    sequences: int
    width: int
    ids: int
    lengths: int
    counts: int
    keys: Mapping[int, int]
    values: Mapping[int, int]
    capacity: int


def last_uses(program: Program) -> dict[str, Operation]:
    """Return the operation that reads each buffer last."""
    uses: dict[str, Operation] = {}
    for op in program["ops"]:
        read = (op.get(name) for name in (*"qkv", "k_shared"))
        parts = [part["buffer"] for part in read if is_part(part)]
        for name in (*(op.get(key) for key in ("x", "y", "gate", "residual")), *parts):
            if isinstance(name, str):
                uses[name] = op
    return uses


def is_part(value: Any) -> bool:
    """Whether a field of an operation is a part of a buffer, and not a number of elements."""
    return isinstance(value, Mapping) and "buffer" in value
