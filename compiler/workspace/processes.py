"""The processes of one run, as torchrun or accelerate launch starts them, and what they exchange.

Each works on a share of the calibration windows; sums over windows are added up over processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed

from alloc_moe.compiler.errors import CalibrationError, ProcessError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that work together; by default it is alone."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes files and talks to the user: one of all does."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's part of `items`.

        Raises:
            CalibrationError: There are fewer items than processes.
        """
        if len(items) < self.size:
            raise CalibrationError(
                f"The calibration text has {len(items)} windows for {self.size} processes. Start "
                f"{len(items)} processes at most, or give more --tokens."
            )
        return list(items[self.rank :: self.size])

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes of a float64 tensor."""
        if self.size == 1:
            return values
        total = values.clone().contiguous()
        with self._talking():
            torch.distributed.all_reduce(total)
        return total

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values [n] of all processes, one after the other; n may differ."""
        if self.size == 1:
            return values
        parts: list[torch.Tensor] = [values] * self.size
        with self._talking():
            torch.distributed.all_gather_object(parts, values)
        return torch.cat(parts)

    def broadcast(self, value: T) -> T:
        """Return the value of the process that writes."""
        if self.size == 1:
            return value
        values = [value]
        with self._talking():
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(
                f"Process {self.rank} of {self.size} lost the others: one of them ended early "
                f"({str(error).splitlines()[0]:.120}). See what it says; the same command goes on "
                "from what was saved."
            ) from error


@contextlib.contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that were started together, if this one was started so."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()
