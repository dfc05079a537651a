"""Keys and values between calls: where they are kept, how they grow, how they fork."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from alloc_moe.runtime.errors import ArtifactError
from alloc_moe.runtime.execution.buffers import (
    BFLOAT16,
    FLOAT,
    FLOAT16,
    INT8,
    Device,
    held_tensor,
    new_array,
    new_tensor,
    to_device,
)

ELEMENT_TYPES = {
    "tensor(float)": FLOAT,
    "tensor(int8)": INT8,
    "tensor(float16)": FLOAT16,
    "tensor(bfloat16)": BFLOAT16,
}
_PAST, _PRESENT = "past_key_values.", "present."

# Of a latent cache, whose room costs time whether it is used or not.
_FEWEST_MORE, _SHARE_MORE = 64, 8


@dataclass(frozen=True)
class CacheSlot:
    """One cache tensor of the graph: names of input and output, shape, ONNX element type.

    ``empty_shape`` is the shape for no past and a batch of 1; ``batch_axis`` and ``past_axis`` are
    those two's. ``shared`` is whether the graph writes in place: input and output may then be one
    buffer that has room for more than the past. ``latent`` is whether it computes on all of that
    buffer, which must hold finite numbers.
    """

    past: str
    present: str
    empty_shape: tuple[int, ...]
    batch_axis: int
    past_axis: int
    element_type: int
    shared: bool = False
    latent: bool = False

    def shape(self, batch: int, length: int) -> tuple[int, ...]:
        """Return the shape of a batch with `length` columns."""
        sizes = {self.batch_axis: batch, self.past_axis: length}
        return tuple(sizes.get(axis, size) for axis, size in enumerate(self.empty_shape))


def find_slots(
    inputs: Iterable[onnxruntime.NodeArg],
    *,
    batch: str | int | None,
    shared: bool,
    path: Path,
    latent: bool = False,
) -> tuple[CacheSlot, ...]:
    """Return the cache tensors among the inputs of a graph.

    Args:
        inputs: As a session gives them.
        batch: What the graph calls the size of the batch.
        shared: Whether the graph writes in place.
        path: The graph's file, for messages.
        latent: Whether it computes on all of the buffers that it writes to.

    Raises:
        ArtifactError: The graph doesn't say enough of one of them.
    """
    return tuple(
        _cache_slot(value, batch=batch, shared=shared, latent=latent, path=path)
        for value in inputs
        if is_past(value.name)
    )


def is_past(name: str) -> bool:
    """Whether a graph's input of that name takes keys or values of the past."""
    return name.startswith(_PAST)


def present_name(past: str) -> str:
    """Return the name of the output that goes with an input of the cache."""
    return _PRESENT + past.removeprefix(_PAST)


def _cache_slot(
    value: onnxruntime.NodeArg,
    *,
    batch: str | int | None,
    shared: bool,
    latent: bool,
    path: Path,
) -> CacheSlot:
    """Return what the graph says of one cache input.

    Its past axis is the symbolic one whose name says so, else the one that isn't the batch's.
    """
    symbols = {
        axis: str(size) for axis, size in enumerate(value.shape) if not isinstance(size, int)
    }
    past = [axis for axis, name in symbols.items() if "past" in name]
    past = past or [axis for axis, name in symbols.items() if name != str(batch)]
    rest = [axis for axis in symbols if axis not in past]
    if len(past) != 1 or len(rest) != 1 or value.type not in ELEMENT_TYPES:
        raise ArtifactError(
            f"The cache {value.name} of {path} is {value.type} {value.shape}; expected floats with "
            "two symbolic sizes, that of the batch and that of the past. Compile the model again."
        )
    sizes = {past[0]: 0, rest[0]: 1}
    return CacheSlot(
        past=value.name,
        present=present_name(value.name),
        empty_shape=tuple(sizes.get(axis, size) for axis, size in enumerate(value.shape)),
        batch_axis=rest[0],
        past_axis=past[0],
        element_type=ELEMENT_TYPES[value.type],
        shared=shared,
        latent=latent,
    )


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
        device: Device = "cpu",
    ) -> None:
        self.batch = batch
        self.length = 0
        self.binding: onnxruntime.IOBinding | None = None
        self.bound_inputs: tuple[object, ...] = ()  # what else `binding` was made for
        self.place: object | None = None  # what kernels of our own made of `addresses`
        self._slots = slots
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
            self.values = [new_tensor(s.shape(batch, 0), s.element_type, device) for s in slots]

    @property
    def shared(self) -> bool:
        """Whether the graph appends in place, so that nothing is copied from call to call."""
        return all(slot.shared for slot in self._slots) and bool(self._slots)

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
        return self._slots is slots

    def fork(self) -> Cache:
        """Return a copy that can be continued on its own."""
        copy = Cache(self._slots, batch=self.batch, device=self._device)
        copy._wanted = self._wanted
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
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"A cache of {self.length} columns can't be cut to {length}.")
        self.length = length
        self._real = self._mask[:, :length].sum(axis=1)
        if not self.shared:
            self.values = [
                onnxruntime.OrtValue.ortvalue_from_numpy(
                    value.numpy()[(*[slice(None)] * slot.past_axis, slice(length))].copy(),
                    self._device,
                    0,
                )
                for value, slot in zip(self.values, self._slots, strict=True)
            ]

    def reserve(self, length: int) -> None:
        """Have room for `length` columns, and if that moves the cache, for as many again.

        A latent cache gets room for an eighth more, but no more than was asked for at first.
        """
        if length <= self.capacity:
            return
        capacity = max(length, 2 * self.capacity)
        if any(slot.latent for slot in self._slots):
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
        """Have a call read this cache and write in place, or to new tensors for `append`."""
        for slot, value in zip(self._slots, self.values, strict=True):
            if self._row is not None or value.element_type() != slot.element_type:
                self._bind_address(binding, slot, value)
                continue
            binding.bind_ortvalue_input(slot.past, value)
            if slot.shared:
                binding.bind_ortvalue_output(slot.present, value)
            else:
                binding.bind_output(slot.present, self._device)

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
            slot.past: value.data_ptr()
            for slot, value in zip(self._slots, self.values, strict=True)
        }

    def append(
        self, new: NDArray[np.int64], values: Sequence[onnxruntime.OrtValue] | None = None
    ) -> None:
        """Count columns in that a call has written, or take over the tensors it made."""
        self._mask[:, self.length : self.length + new.shape[1]] = new
        self.length += new.shape[1]
        self._real = self._real + new.sum(axis=1)
        if values is not None:
            self.values = list(values)

    def row(self, row: int) -> Cache:
        """Return one sequence of a shared cache whose batch comes first, on the same memory."""
        part = Cache(self._slots, batch=1, device=self._device)
        part.length = self.length
        part._mask, part._real = self._mask[row : row + 1], self._real[row : row + 1]
        part._buffers, part.values, part._row = self._buffers, self.values, row
        return part

    def _make_room(self, capacity: int, source: Cache | None = None) -> None:
        """Make buffers for so many columns that begin with the columns of another cache."""
        used = source.length if source is not None else 0
        olds: Sequence[NDArray[Any]] = ()
        if source is not None and used:
            olds = source._buffers or [value.numpy() for value in source.values]
        self._buffers, values = [], []
        for index, slot in enumerate(self._slots):
            shape = slot.shape(self.batch, capacity)
            if self._device != "cpu" and not olds:
                values.append(held_tensor(shape, slot.element_type, self._device))
                continue
            buffer = new_array(shape, slot.element_type)
            if slot.latent:
                buffer.fill(0)
            if olds:
                columns = (*[slice(None)] * slot.past_axis, slice(used))
                buffer[columns] = olds[index][columns]
            values.append(to_device(buffer, self._device))
            if self._device == "cpu":  # what the graph writes is in the array
                self._buffers.append(buffer)
        self.values, self.binding, self.place = values, None, None
