"""What the walk knows of a value of the graph."""

from __future__ import annotations

from dataclasses import dataclass


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
