"""States of fixed size beside keys and values: convolutions' last columns, what recurrences hold.

A call reads all of a state and makes another of its size, so none can be undone. Two buffers take
turns: the one that a call reads, and the one that it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.buffers import new_array, to_device

if TYPE_CHECKING:
    from alloc_moe.runtime.execution.slots import CacheSlot


class States:
    """The states of a batch in the host's memory, zeros at first.

    Padding before a row's first token leaves them as they are, and so does a call that has nothing
    but padding for a row. Padding behind a row's tokens gets into its states, so that row can't go
    on.
    """

    def __init__(self, slots: Sequence[CacheSlot], batch: int) -> None:
        shapes = [(slot.shape(batch, 0), slot.element_type) for slot in slots]
        self._slots = slots
        self._read = [new_array(*shape) for shape in shapes]
        self._written = [new_array(*shape) for shape in shapes]
        self._ended = np.zeros(batch, bool)
        self.clear()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._slots)

    def __str__(self) -> str:
        """Which there are, by an example."""
        return f"{self._slots[0].past} and {len(self._slots) - 1} more" if self._slots else "none"

    def clear(self) -> None:
        """Forget all tokens."""
        for state in self._read:
            state.fill(0)
        self._ended[:] = False

    def fork(self) -> States:
        """Return a copy that can be continued on its own."""
        copy = States(self._slots, len(self._ended))
        copy._ended = self._ended.copy()
        for state, source in zip(copy._read, self._read, strict=True):
            state[:] = source
        return copy

    def row(self, row: int) -> States:
        """Return those of one sequence, on the same memory."""
        part = States((), 1)
        part._slots, part._ended = self._slots, self._ended[row : row + 1]
        part._read = [state[row : row + 1] for state in self._read]
        part._written = [state[row : row + 1] for state in self._written]
        return part

    def replace(self, row: int, other: States, place: int) -> None:
        """Have another's states of a sequence in place of a row's."""
        self._ended[row] = other._ended[place]
        for state, source in zip(self._read, other._read, strict=True):
            state[row] = source[place]

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        """Have the next call read the states and write to the other buffers."""
        for slot, read, written in zip(self._slots, self._read, self._written, strict=True):
            binding.bind_ortvalue_input(slot.past, to_device(read, "cpu"))
            binding.bind_ortvalue_output(slot.present, to_device(written, "cpu"))

    def check(self, new: NDArray[np.int64], before: NDArray[np.int64], *, path: Path) -> None:
        """Raise GenerationError if padding would get between tokens of a row.

        Args:
            new: Which columns of a call are real tokens [batch, columns].
            before: How many real tokens each row has so far [batch].
            path: The graph's file, for the message.
        """
        if not self._slots:
            return
        columns = np.concatenate([(before > 0)[:, None], new > 0], axis=1)
        rises = (columns[:, 1:] & ~columns[:, :-1]).sum(axis=1) + columns[:, 0]
        wrong = ((rises > 1) | self._ended) & new.any(axis=1)
        if wrong.any():
            raise GenerationError(
                f"Row {int(wrong.argmax()) + 1} has padding between its tokens, which would get "
                f"into the states that {path} keeps besides keys and values. Give padding before "
                "a row's first token, or in all of a call."
            )

    def append(self, new: NDArray[np.int64]) -> None:
        """Take over what a call has written; `new` as that of `check`."""
        if not self._slots:
            return
        self._read, self._written = self._written, self._read
        real = new > 0
        for row in np.flatnonzero(~real.any(axis=1)):
            for state, old in zip(self._read, self._written, strict=True):
                state[row] = old[row]
        self._ended |= real.any(axis=1) & ~real[:, -1]
