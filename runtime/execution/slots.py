"""What a graph keeps from call to call, as it says itself: names, shapes and types."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from alloc_moe.runtime.errors import ArtifactError
from alloc_moe.runtime.execution.buffers import BFLOAT16, FLOAT, FLOAT16, INT8

ELEMENT_TYPES = {
    "tensor(float)": FLOAT,
    "tensor(int8)": INT8,
    "tensor(float16)": FLOAT16,
    "tensor(bfloat16)": BFLOAT16,
}
_PAST, _PRESENT, _STATE = "past_key_values.", "present.", "_state"


@dataclass(frozen=True)
class CacheSlot:
    """One cache tensor of the graph: names of input and output, shape, ONNX element type.

    ``empty_shape`` is the shape for no past and a batch of 1; ``batch_axis`` and ``past_axis`` are
    those two's, the latter None for a state whose size doesn't depend on the past. ``shared`` is
    whether the graph writes in place: input and output may then be one buffer that has room for
    more than the past. ``latent`` is whether it computes on all of that buffer,
    which must hold finite numbers.
    """

    past: str
    present: str
    empty_shape: tuple[int, ...]
    batch_axis: int
    past_axis: int | None
    element_type: int
    shared: bool = False
    latent: bool = False

    def shape(self, batch: int, length: int) -> tuple[int, ...]:
        """Return the shape of a batch with `length` columns."""
        sizes: dict[int | None, int] = {self.past_axis: length, self.batch_axis: batch}
        return tuple(sizes.get(axis, size) for axis, size in enumerate(self.empty_shape))

    def first_columns(self, length: int) -> tuple[slice, ...]:
        """Return the index of the first `length` columns of keys or values."""
        assert self.past_axis is not None
        return (*[slice(None)] * self.past_axis, slice(length))


def find_slots(
    inputs: Iterable[onnxruntime.NodeArg],
    *,
    batch: str | int | None,
    shared: bool,
    latent: bool,
    path: Path,
) -> tuple[CacheSlot, ...]:
    """Return the cache tensors among the inputs of a graph, states of a fixed size last.

    Args:
        inputs: As a session gives them.
        batch: What the graph calls the size of the batch.
        shared: Whether the graph writes in place.
        latent: Whether it computes on all of the buffers then.
        path: The graph's file, for messages.

    Raises:
        ArtifactError: The graph doesn't say enough of one of them.
    """
    past = [value for value in inputs if is_past(value.name)]
    grown = (
        _cache_slot(value, batch=batch, shared=shared, latent=latent, path=path)
        for value in past
        if not _fixed(value)
    )
    return (*grown, *(_state_slot(value, path=path) for value in past if _fixed(value)))


def is_past(name: str) -> bool:
    """Whether a graph's input of that name takes keys or values of the past."""
    return name.startswith(_PAST)


def present_name(past: str) -> str:
    """Return the name of the output that goes with an input of the cache."""
    return _PRESENT + past.removeprefix(_PAST)


def _fixed(value: onnxruntime.NodeArg) -> bool:
    return str(value.name).endswith(_STATE)


def _state_slot(value: onnxruntime.NodeArg, *, path: Path) -> CacheSlot:
    """Return what the graph says of a state, whose first size alone is symbolic: the batch's."""
    batch, *sizes = value.shape
    if isinstance(batch, int) or not all(isinstance(size, int) for size in sizes):
        raise _wrong(value, path, "that of the batch as its only symbolic size, the first")
    if value.type != "tensor(float)":
        raise _wrong(value, path, "float32")
    return CacheSlot(
        past=value.name,
        present=present_name(value.name),
        empty_shape=(1, *sizes),
        batch_axis=0,
        past_axis=None,
        element_type=FLOAT,
    )


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
        raise _wrong(
            value, path, "floats with two symbolic sizes, that of the batch and that of the past"
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


def _wrong(value: onnxruntime.NodeArg, path: Path, expected: str) -> ArtifactError:
    return ArtifactError(
        f"The cache {value.name} of {path} is {value.type} {value.shape}; expected {expected}. "
        "Compile the model again."
    )
