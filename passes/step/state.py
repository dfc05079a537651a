"""What the walk over a graph knows: operations written down, and what values are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from alloc_moe.passes.experts.lower import Allocation
from alloc_moe.passes.step.matching import NotExpressibleError
from alloc_moe.passes.step.records import CacheLayer, Op


@dataclass(frozen=True)
class Row:
    """``width`` columns of a buffer of ``whole`` columns, from ``offset`` on."""

    buffer: str
    offset: int
    width: int
    whole: int

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its buffer."""
        return self.width == self.whole


@dataclass(frozen=True)
class Sigmoid:
    """The sigmoid of a row."""

    of: Row


@dataclass(frozen=True)
class Silu:
    """A row times its sigmoid."""

    of: Row


@dataclass(frozen=True)
class Lost:
    """A value that a step program has no words for, and why."""

    reason: str


Known = Row | Sigmoid | Silu | Lost


class Walk:
    """The operations found so far, and what is known of values.

    Args:
        allocation: What is kept of the routers' candidates.
    """

    def __init__(self, allocation: Allocation) -> None:
        self.allocation = allocation
        self.ops: list[Op] = []
        self.cache: list[CacheLayer] = []
        self._known: dict[ir.Value, Known] = {}
        self._buffers = 0

    def known(self, value: ir.Value | None) -> Known | None:
        """Return what is known of a value, None if it isn't made of the tokens' rows."""
        return None if value is None else self._known.get(value)

    def learn(self, results: Mapping[ir.Value, Known]) -> None:
        """Keep what is known of the outputs of a node."""
        self._known.update(results)

    def row(self, value: ir.Value | None) -> Row:
        """Return the row that a value is.

        Raises:
            NotExpressibleError: It is none.
        """
        found = self.known(value)
        if isinstance(found, Lost):
            raise NotExpressibleError(found.reason)
        if not isinstance(found, Row):
            raise NotExpressibleError("it computes with something else than hidden states")
        return found

    def whole(self, value: ir.Value | None) -> Row:
        """Return the row that a value is, which must be all of its buffer."""
        found = self.row(value)
        if not found.is_whole:
            raise NotExpressibleError("it computes with parts of a product")
        return found

    def buffer(self, width: int, kind: str = "b") -> Row:
        """Return a new buffer."""
        self._buffers += 1
        return Row(f"{kind}{self._buffers}", 0, width, width)

    def add(self, op: Op) -> None:
        """Write an operation down."""
        self.ops.append(op)


Results = Mapping[ir.Value, Known]
Visit = Callable[[Walk, ir.Node], Results]
"""Writes down what a node computes, and returns what is known of its outputs.

It raises `NotExpressibleError` where a step program has no words for that.
"""
