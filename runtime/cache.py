"""Keys and values between calls: where they are kept, how they grow, how they fork."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

FLOAT, INT8, BFLOAT16 = 1, 3, 16
ELEMENT_TYPES = {
    "tensor(float)": FLOAT,
    "tensor(int8)": INT8,
    "tensor(float16)": 10,
    "tensor(bfloat16)": BFLOAT16,
}
_SHARED_TYPES: dict[int, np.dtype[Any]] = {FLOAT: np.dtype(np.float32), INT8: np.dtype(np.int8)}


@dataclass(frozen=True)
class CacheSlot:
    """One cache tensor of the graph: names of input and output, shape, ONNX element type.

    ``empty_shape`` is the shape for no past and a batch of 1; ``batch_axis`` and ``past_axis`` are
    those two's. ``shared`` is whether the graph writes in place: input and output may then be one
    buffer that has room for more than the past.
    """

    past: str
    present: str
    empty_shape: tuple[int, ...]
    batch_axis: int
    past_axis: int
    element_type: int
    shared: bool = False

    def shape(self, batch: int, length: int) -> tuple[int, ...]:
        """Return the shape of a batch with `length` columns."""
        sizes = {self.batch_axis: batch, self.past_axis: length}
        return tuple(sizes.get(axis, size) for axis, size in enumerate(self.empty_shape))


class Cache:
    """Keys and values of the first ``length`` columns of a batch; a session's calls append to it.

    A call changes the cache it is given, so one cache serves one continuation: `fork` it to go on
    in two ways. Get one from `ArtifactSession.empty_cache`.
    """

    def __init__(
        self,
        slots: Sequence[CacheSlot],
        *,
        batch: int,
        capacity: int = 0,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        self.batch = batch
        self.length = 0
        self.binding: onnxruntime.IOBinding | None = None
        self.bound_inputs: tuple[object, ...] = ()  # what else `binding` was made for
        self._slots = slots
        self._device = device
        self._mask = np.ones((batch, capacity), np.int64)
        self._real = np.zeros(batch, np.int64)  # real tokens so far, for the next position
        self._buffers: list[NDArray[np.generic]] = []
        self.values: list[onnxruntime.OrtValue] = []
        if self.shared:
            self._move(
                [np.empty(s.shape(batch, capacity), _SHARED_TYPES[s.element_type]) for s in slots]
            )
        else:
            self.values = [
                onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                    s.shape(batch, 0), s.element_type, device, 0
                )
                for s in slots
            ]

    @property
    def shared(self) -> bool:
        """Whether the graph appends in place, so that nothing is copied from call to call."""
        return all(slot.shared for slot in self._slots) and bool(self._slots)

    @property
    def capacity(self) -> int:
        """The columns there is room for before anything must be moved."""
        return self._mask.shape[1]

    def fork(self) -> Cache:
        """Return a copy that can be continued on its own."""
        copy = Cache(self._slots, batch=self.batch, device=self._device)
        copy.length, copy._mask, copy._real = self.length, self._mask.copy(), self._real.copy()
        if self.shared:
            copy._move([self._grown(buffer, slot, self.capacity) for buffer, slot in self._pairs()])
        else:
            copy.values = list(self.values)  # the graph makes new ones and never writes to these
        return copy

    def reserve(self, length: int) -> None:
        """Have room for `length` columns, and if that moves the cache, for as many again."""
        if length <= self.capacity:
            return
        capacity = max(length, 2 * self.capacity)
        mask = np.ones((self.batch, capacity), np.int64)
        mask[:, : self.length] = self._mask[:, : self.length]
        if self.shared:
            self._move([self._grown(buffer, slot, capacity) for buffer, slot in self._pairs()])
        self._mask = mask

    def extended_mask(self, new: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the mask [batch, length + new columns], for which there must be room."""
        end = self.length + new.shape[1]
        self._mask[:, self.length : end] = new
        return np.ascontiguousarray(self._mask[:, :end])

    def positions(self, new: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of new columns [batch, columns], counted over real tokens."""
        positions: NDArray[np.int64] = self._real[:, None] + new.cumsum(axis=1) - 1
        return positions.clip(min=0)

    def append(
        self, new: NDArray[np.int64], values: Sequence[onnxruntime.OrtValue] | None = None
    ) -> None:
        """Count columns in that a call has written, or take over the tensors it made."""
        self.length += new.shape[1]
        self._real = self._real + new.sum(axis=1)
        if values is not None:
            self.values = list(values)

    def row(self, row: int) -> Cache:
        """Return one sequence of a shared cache, on the same memory."""
        part = Cache(self._slots, batch=1)
        part.length = self.length
        part._mask, part._real = self._mask[row : row + 1], self._real[row : row + 1]
        index = [(*[slice(None)] * slot.batch_axis, slice(row, row + 1)) for slot in self._slots]
        part._move([buffer[at] for buffer, at in zip(self._buffers, index, strict=True)])
        return part

    def _move(self, buffers: list[NDArray[np.generic]]) -> None:
        self._buffers = buffers
        # These hold no copy: what the graph writes is in the arrays.
        self.values = [onnxruntime.OrtValue.ortvalue_from_numpy(buffer) for buffer in buffers]
        self.binding = None

    def _pairs(self) -> list[tuple[NDArray[np.generic], CacheSlot]]:
        return list(zip(self._buffers, self._slots, strict=True))

    def _grown(
        self, buffer: NDArray[np.generic], slot: CacheSlot, capacity: int
    ) -> NDArray[np.generic]:
        grown = np.empty(slot.shape(self.batch, capacity), buffer.dtype)
        used = (*[slice(None)] * slot.past_axis, slice(self.length))
        grown[used] = buffer[used]
        return grown
