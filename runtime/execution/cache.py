"""What a batch keeps between calls: where keys and values lie, how they grow, how all forks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.buffers import (
    Device,
    held_array,
    held_tensor,
    new_array,
    new_tensor,
    tensor_of,
    to_device,
)
from alloc_moe.runtime.execution.slots import CacheSlot
from alloc_moe.runtime.execution.states import States

# Of a latent cache, whose room costs time whether it is used or not.
_FEWEST_MORE, _SHARE_MORE = 64, 8


class Cache:
    """Keys and values of the first ``length`` columns of a batch; a session's calls append to it.

    ``states`` are what the graph keeps besides, whatever the number of columns. A call changes the
    cache it is given, so one cache serves one continuation: `fork` it to go on in two ways. Get one
    from `ArtifactSession.empty_cache`.
    """

    def __init__(
        self,
        slots: Sequence[CacheSlot],
        *,
        batch: int,
        capacity: int = 0,
        device: Device = "cpu",
    ) -> None:
        self.batch = batch
        self.length = 0
        self.binding: onnxruntime.IOBinding | None = None
        self.bound_inputs: tuple[object, ...] = ()  # what else `binding` was made for
        self.place: object | None = None  # what kernels of our own made of `addresses`
        self._all_slots = slots
        self.slots = [slot for slot in slots if slot.past_axis is not None]  # of `arrays`
        self.states = States([slot for slot in slots if slot.past_axis is None], batch)
        self._wanted = capacity
        if any(slot.latent for slot in slots):
            capacity = 0  # made when it is needed, in steps
        self._device = device
        self._mask = np.ones((batch, capacity), np.int64)
        self._real = np.zeros(batch, np.int64)  # real tokens so far, for the next position
        self._buffers: list[NDArray[Any]] = []  # of a shared cache in the host's memory
        self.values: list[onnxruntime.OrtValue] = []
        self._row: int | None = None  # of which `values` hold a whole batch
        if self.shared:
            self._make_room(capacity)
        else:
            self.values = [
                new_tensor(slot.shape(batch, 0), slot.element_type, device) for slot in self.slots
            ]

    @property
    def shared(self) -> bool:
        """Whether the graph appends in place, so that nothing is copied from call to call."""
        return all(slot.shared for slot in self.slots) and bool(self.slots)

    @property
    def capacity(self) -> int:
        """The columns there is room for before anything must be moved."""
        return self._mask.shape[1]

    @property
    def mask(self) -> NDArray[np.int64]:
        """Which of its columns are real tokens [batch, length]."""
        return self._mask[:, : self.length]

    @property
    def real_tokens(self) -> NDArray[np.int64]:
        """How many of its columns are, per sequence."""
        return self._real

    def is_of(self, slots: Sequence[CacheSlot]) -> bool:
        """Whether it was made for the session that has these slots."""
        return self._all_slots is slots

    def fork(self) -> Cache:
        """Return a copy that can be continued on its own."""
        copy = Cache(self._all_slots, batch=self.batch, device=self._device)
        copy._wanted = self._wanted
        copy.states = self.states.fork()
        copy.length, copy._mask, copy._real = self.length, self._mask.copy(), self._real.copy()
        if self.shared:
            copy._make_room(self.capacity, self)
        else:
            copy.values = list(self.values)  # the graph makes new ones and never writes to these
        return copy

    def truncate(self, length: int) -> None:
        """Forget the columns from `length` on; a shared cache keeps its memory for others.

        Raises:
            ValueError: The cache has fewer columns.
            GenerationError: It has states of a fixed size, which can't go back but to the start.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"A cache of {self.length} columns can't be cut to {length}.")
        if length == self.length:
            return
        if self.states and length:
            raise GenerationError(
                f"A cache of {self.length} columns can't be cut to {length}, as the model's states "
                f"({self.states}) hold all its tokens at once. Fork the cache where you want to "
                "come back to, or cut it to 0."
            )
        self.states.clear()
        self.length = length
        self._real = self._mask[:, :length].sum(axis=1)
        if not self.shared:
            self.values = [
                tensor_of(
                    held_array(value)[slot.first_columns(length)], slot.element_type, self._device
                )
                for value, slot in zip(self.values, self.slots, strict=True)
            ]

    def reserve(self, length: int) -> None:
        """Have room for `length` columns, and if that moves the cache, for as many again.

        A latent cache gets room for an eighth more, but no more than was asked for at first.
        """
        if length <= self.capacity:
            return
        capacity = max(length, 2 * self.capacity)
        if any(slot.latent for slot in self.slots):
            capacity = length + max(length // _SHARE_MORE, _FEWEST_MORE)
            capacity = min(capacity, self._wanted) if self._wanted >= length else capacity
        mask = np.ones((self.batch, capacity), np.int64)
        mask[:, : self.length] = self._mask[:, : self.length]
        if self.shared:
            self._make_room(capacity, self)
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

    def token_inputs(
        self, ids: NDArray[np.int64], new: NDArray[np.int64]
    ) -> dict[str, NDArray[np.int64]]:
        """Return what a graph takes of a call's tokens besides this cache, by the input's name.

        Args:
            ids: Token ids [batch, columns], for which there must be room.
            new: Their mask, of the same shape.
        """
        return {
            "input_ids": ids,
            "attention_mask": self.extended_mask(new),
            "position_ids": self.positions(new),
        }

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        """Have a call read this cache and write in place, or to new tensors for `append`.

        States go to other buffers, which is to be said again before each call: `states.bind`.
        """
        for slot, value in zip(self.slots, self.values, strict=True):
            if self._row is not None or value.element_type() != slot.element_type:
                self._bind_address(binding, slot, value)
                continue
            binding.bind_ortvalue_input(slot.past, value)
            if slot.shared:
                binding.bind_ortvalue_output(slot.present, value)
            else:
                binding.bind_output(slot.present, self._device)
        self.states.bind(binding)

    def _bind_address(
        self, binding: onnxruntime.IOBinding, slot: CacheSlot, value: onnxruntime.OrtValue
    ) -> None:
        shape, address = value.shape(), value.data_ptr()
        if self._row is not None:
            address += value.tensor_size_in_bytes() // shape[0] * self._row
            shape[0] = 1
        place = (self._device, 0, slot.element_type, shape, address)
        binding.bind_input(slot.past, *place)
        binding.bind_output(slot.present, *place)

    def addresses(self) -> dict[str, int]:
        """Return where a shared cache on a device is, by the names of the graph's inputs."""
        return {
            slot.past: value.data_ptr() for slot, value in zip(self.slots, self.values, strict=True)
        }

    def append(
        self, new: NDArray[np.int64], values: Sequence[onnxruntime.OrtValue] | None = None
    ) -> None:
        """Count columns in that a call has written, or take over the keys and values it made."""
        self.states.append(new)
        self._mask[:, self.length : self.length + new.shape[1]] = new
        self.length += new.shape[1]
        self._real = self._real + new.sum(axis=1)
        if values is not None:
            self.values = list(values[: len(self.slots)])

    def row(self, row: int) -> Cache:
        """Return one sequence of a shared cache whose batch comes first, on the same memory."""
        part = Cache(self._all_slots, batch=1, device=self._device)
        part.states = self.states.row(row)
        part.length = self.length
        part._mask, part._real = self._mask[row : row + 1], self._real[row : row + 1]
        part._buffers, part.values, part._row = self._buffers, self.values, row
        return part

    def arrays(self) -> list[NDArray[Any]]:
        """Return its tensors in the host's memory: those of a shared cache there, else copies."""
        return self._buffers or [held_array(value) for value in self.values]

    def hold(self, arrays: Sequence[NDArray[Any]], mask: NDArray[np.int64]) -> None:
        """Have other tensors in place of its own.

        Args:
            arrays: As `arrays` gives them, with all of the capacity's columns if it is shared.
            mask: Which columns are real tokens [batch, columns].
        """
        self.length = mask.shape[1]
        self._mask[:, : self.length] = mask
        self._real = mask.sum(axis=1)
        in_place = self.shared and self._device == "cpu"
        self._buffers = list(arrays) if in_place else []
        self.values = [
            to_device(array, self._device)
            if slot.shared
            else tensor_of(array, slot.element_type, self._device)
            for array, slot in zip(arrays, self.slots, strict=True)
        ]
        self.binding, self.place = None, None

    @property
    def replaces_rows(self) -> bool:
        """Whether what is written to its `arrays` is in the cache."""
        return bool(self._buffers)

    def replace_mask(self, row: int, length: int) -> None:
        """Have the last `length` columns of a sequence be real tokens, and no others."""
        self._mask[row, : self.length] = np.arange(self.length) >= self.length - length
        self._real[row] = length

    def _make_room(self, capacity: int, source: Cache | None = None) -> None:
        """Make buffers for so many columns that begin with the columns of another cache."""
        used = source.length if source is not None else 0
        olds: Sequence[NDArray[Any]] = ()
        if source is not None and used:
            olds = source._buffers or [value.numpy() for value in source.values]
        self._buffers, values = [], []
        for index, slot in enumerate(self.slots):
            shape = slot.shape(self.batch, capacity)
            if self._device != "cpu" and not olds:
                values.append(held_tensor(shape, slot.element_type, self._device))
                continue
            buffer = new_array(shape, slot.element_type)
            if slot.latent:
                buffer.fill(0)
            if olds:
                columns = slot.first_columns(used)
                buffer[columns] = olds[index][columns]
            values.append(to_device(buffer, self._device))
            if self._device == "cpu":  # what the graph writes is in the array
                self._buffers.append(buffer)
        self.values, self.binding, self.place = values, None, None
