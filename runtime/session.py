"""An artifact in onnxruntime: one call in, logits and the grown key/value cache out."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from alloc_moe.runtime.artifact import (
    DROPPED,
    PRICE_INPUT,
    ROUTER_PROBS,
    ROUTER_WEIGHTS,
    AllocationPlan,
)
from alloc_moe.runtime.errors import ArtifactError, GenerationError
from alloc_moe.runtime.files import ArtifactFiles, find_artifact
from alloc_moe.runtime.onnx_file import with_outputs
from alloc_moe.runtime.providers import CUDA, Provider, create_session

_PAST, _PRESENT = "past_key_values.", "present."
_BFLOAT16 = 16
_ELEMENT_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": _BFLOAT16}
_LOG_ERRORS_ONLY = 3


@dataclass(frozen=True)
class CacheSlot:
    """One cache tensor of the graph: names of input and output, shape, ONNX element type.

    ``empty_shape`` is the shape for no past and a batch of 1, whose axis is ``batch_axis``.
    """

    past: str
    present: str
    empty_shape: tuple[int, ...]
    batch_axis: int
    element_type: int


@dataclass(frozen=True)
class Cache:
    """Keys and values of the first ``length`` columns of a batch, on the session's device.

    It is never written to: a cache may be continued any number of times.
    """

    length: int
    values: tuple[onnxruntime.OrtValue, ...]


@dataclass(frozen=True)
class Output:
    """What one call gave.

    ``logits`` are [batch, sequence, vocabulary], float32 or float16. ``rows[l]`` are the experts
    executed per row of the MoE operator of layer l, None unless the session counts them: the rows
    are the call's tokens, padding included, or (token, expert) pairs if the artifact compacts them.
    """

    logits: NDArray[np.floating]
    cache: Cache
    rows: tuple[NDArray[np.int64], ...] | None

    @property
    def activations(self) -> tuple[int, ...] | None:
        """The experts executed per MoE layer, padding included; None unless counted."""
        return None if self.rows is None else tuple(int(counts.sum()) for counts in self.rows)


class ArtifactSession:
    """An artifact loaded into onnxruntime. Get one from `open_session`."""

    def __init__(
        self, session: onnxruntime.InferenceSession, files: ArtifactFiles, *, counting: bool
    ) -> None:
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = {value.name: value for value in session.get_outputs()}
        _check_io(set(inputs), set(outputs), path=files.graph)
        self.files = files
        self.device: Literal["cpu", "cuda"] = "cuda" if CUDA in session.get_providers() else "cpu"
        self.slots = tuple(
            _cache_slot(value, batch=inputs["input_ids"].shape[0], path=files.graph)
            for name, value in inputs.items()
            if name.startswith(_PAST)
        )
        vocabulary = outputs["logits"].shape[-1]
        self.vocabulary = vocabulary if isinstance(vocabulary, int) else None
        self._session = session
        self.has_dial = PRICE_INPUT in {v.name for v in session.get_overridable_initializers()}
        self._has_positions = "position_ids" in inputs
        self._counted = _counted_values(files) if counting else ()

    @property
    def plan(self) -> AllocationPlan:
        """The plan that was compiled in."""
        return self.files.plan

    @property
    def counts_activations(self) -> bool:
        """Whether every call says how many experts each layer executed."""
        return bool(self._counted)

    def empty_cache(self, batch: int) -> Cache:
        """Return the cache to start a batch with."""
        values = []
        for slot in self.slots:
            shape = list(slot.empty_shape)
            shape[slot.batch_axis] = batch
            values.append(
                onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                    shape, slot.element_type, self.device, 0
                )
            )
        return Cache(0, tuple(values))

    def run(
        self,
        input_ids: NDArray[np.int64],
        *,
        attention_mask: NDArray[np.int64] | None = None,
        cache: Cache | None = None,
        price: float | None = None,
    ) -> Output:
        """Run one call: a whole prompt, a piece of it, or one token per sequence.

        Args:
            input_ids: [batch, sequence].
            attention_mask: [batch, cache.length + sequence], 1 = real token, 0 = padding, which is
                on the left of each row or anywhere else. All ones by default.
            cache: What `empty_cache` or the call before gave; empty by default.
            price: For artifacts with a dial: of an activation, in place of the one compiled in. See
                `alloc_moe.runtime.dial.price_of`.

        Raises:
            GenerationError: There is a price, but no dial.
        """
        check_price(self, price)
        batch, sequence = input_ids.shape
        if cache is None:
            cache = self.empty_cache(batch)
        if attention_mask is None:
            attention_mask = np.ones((batch, cache.length + sequence), np.int64)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(input_ids, np.int64))
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(attention_mask, np.int64))
        if self._has_positions:
            positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, -sequence:]
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        if price is not None:
            # bind_cpu_input takes required inputs only.
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(price, np.float32))
            binding.bind_ortvalue_input(PRICE_INPUT, value)
        for slot, value in zip(self.slots, cache.values, strict=True):
            binding.bind_ortvalue_input(slot.past, value)
            binding.bind_output(slot.present, self.device)
        binding.bind_output("logits", "cpu")
        for name in self._counted:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        present, (logits, *probs) = _split(binding.get_outputs(), len(self.slots))
        return Output(
            to_numpy(logits),
            Cache(cache.length + sequence, tuple(present)),
            tuple(map(_executed, self._counted, probs)) if self._counted else None,
        )


def open_session(
    path: str | Path,
    *,
    ep: Provider = "auto",
    threads: int | None = None,
    count_activations: bool = False,
    stop_spinning: bool = False,
) -> ArtifactSession:
    """Load an artifact into onnxruntime.

    Args:
        path: A bundle folder or an .onnx file.
        ep: Execution provider; ``auto`` is CUDA if it can be used, else the CPU.
        threads: Threads that share the work of one operator; by default one per physical core.
        count_activations: Have every call say how many experts each layer executed.
        stop_spinning: Let idle threads sleep between calls. Slower by a few microseconds per
            call, but sessions in one process, or other work between calls, disturb each other less.

    Raises:
        ArtifactError: Something is missing, damaged, or was not compiled by alloc-moe.
        DeviceError: ``ep="cuda"``, but CUDA can't be used.
    """
    files = find_artifact(path)
    files.check_data()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_ERRORS_ONLY
    if threads is not None:
        if threads < 1:
            raise GenerationError(f"{threads} threads can't run a model. Give 1 or more.")
        options.intra_op_num_threads = threads
    if stop_spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    model: str | bytes = str(files.graph)
    if count_activations:
        model = _with_counts(files, options)
    session = create_session(model, options, ep=ep, name=files.graph)
    return ArtifactSession(session, files, counting=count_activations)


def check_price(session: ArtifactSession, price: float | None) -> None:
    """Raise GenerationError if the artifact can't be run at this price."""
    if price is None:
        return
    if not session.has_dial:
        raise GenerationError(
            f"{session.files.graph} has its budget compiled in, so it can't be run at another. "
            "Compile it with --redistribute price and no cap, or leave the budget out."
        )
    if not price >= 0:
        raise GenerationError(f"The price of an activation is {price}. Give 0 or more.")


def to_numpy(value: onnxruntime.OrtValue) -> NDArray[np.floating]:
    """Return a tensor in host memory as an array; bfloat16, which numpy lacks, as float32."""
    if value.element_type() != _BFLOAT16:
        array: NDArray[np.floating] = value.numpy()
        return array
    shape = value.shape()
    halves = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    bits = np.frombuffer(halves, np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(shape)


def _with_counts(files: ArtifactFiles, options: onnxruntime.SessionOptions) -> bytes:
    """Return the model with the router probabilities as outputs; set where its data are."""
    names = _counted_values(files)
    if missing := [name for name in names if name not in files.onnx.node_outputs]:
        raise ArtifactError(
            f"{files.graph} has no value {missing[0]}, so activations can't be counted. "
            "Compile the model again with this version of alloc-moe."
        )
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(files.graph.parent.resolve())
    )
    return with_outputs(files.graph.read_bytes(), names)


def _counted_values(files: ArtifactFiles) -> tuple[str, ...]:
    """Return the name of what says, per layer, which experts run for which row."""
    names = (
        [form.format(layer=layer) for form in (ROUTER_WEIGHTS, ROUTER_PROBS)]
        for layer in range(len(files.plan.layers))
    )
    found = files.onnx.node_outputs
    return tuple(weights if weights in found else probs for weights, probs in names)


def _executed(name: str, value: onnxruntime.OrtValue) -> NDArray[np.int64]:
    least = 0.0 if name.startswith(ROUTER_WEIGHTS.format(layer="")) else DROPPED / 2
    executed: NDArray[np.int64] = np.count_nonzero(to_numpy(value) > least, axis=1)
    return executed


def _split(
    values: Sequence[onnxruntime.OrtValue], count: int
) -> tuple[Sequence[onnxruntime.OrtValue], Sequence[onnxruntime.OrtValue]]:
    return values[:count], values[count:]


def _check_io(inputs: set[str], outputs: set[str], *, path: Path) -> None:
    """Raise ArtifactError unless the graph has the I/O of a causal language model."""
    known = {"input_ids", "attention_mask", "position_ids"}
    lacking = {"input_ids", "attention_mask", "logits"} - inputs - outputs
    extra = {name for name in inputs if name not in known and not name.startswith(_PAST)}
    unpaired = {name for name in inputs if name.startswith(_PAST) and _present(name) not in outputs}
    for problem, names in (("lacks", lacking), ("needs", extra), ("never updates", unpaired)):
        if names:
            raise ArtifactError(
                f"{path} {problem} {', '.join(sorted(names))}, which this version can't handle. "
                "Update alloc-moe, or compile the model again."
            )


def _present(past: str) -> str:
    return _PRESENT + past.removeprefix(_PAST)


def _cache_slot(value: onnxruntime.NodeArg, *, batch: str | int | None, path: Path) -> CacheSlot:
    """Return what the graph says of one cache input.

    Its past axis is the symbolic one whose name says so, else the one that isn't the batch's.
    """
    symbols = {
        axis: str(size) for axis, size in enumerate(value.shape) if not isinstance(size, int)
    }
    past = [axis for axis, name in symbols.items() if "past" in name]
    past = past or [axis for axis, name in symbols.items() if name != str(batch)]
    rest = [axis for axis in symbols if axis not in past]
    if len(past) != 1 or len(rest) != 1 or value.type not in _ELEMENT_TYPES:
        raise ArtifactError(
            f"The cache {value.name} of {path} is {value.type} {value.shape}; expected floats with "
            "two symbolic sizes, that of the batch and that of the past. Compile the model again."
        )
    sizes = {past[0]: 0, rest[0]: 1}
    return CacheSlot(
        past=value.name,
        present=_present(value.name),
        empty_shape=tuple(sizes.get(axis, size) for axis, size in enumerate(value.shape)),
        batch_axis=rest[0],
        element_type=_ELEMENT_TYPES[value.type],
    )
