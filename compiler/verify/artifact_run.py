"""Prefill and decode with an artifact in onnxruntime: whole, or one segment of it at a time.

Segment by segment, every call of every run goes through one before the next is loaded: the keys and
values of a layer stay within its segment, so each takes its own part of the cache from call to
call. No more than one segment's weights are in memory, and each is read once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime

from alloc_moe.compiler.verify.segments import cut_graph, extract_segment
from alloc_moe.runtime.artifact.counting import (
    counted_values,
    executed,
    least_executed,
    most_executed,
)
from alloc_moe.runtime.artifact.files import find_artifact
from alloc_moe.runtime.artifact.plan import (
    LATENT_CACHE_KEY,
    PADDING_KEY,
    PRICE_INPUT,
    SHARED_CACHE_KEY,
)
from alloc_moe.runtime.execution.buffers import to_numpy
from alloc_moe.runtime.execution.cache import Cache
from alloc_moe.runtime.execution.padding import pad_right
from alloc_moe.runtime.execution.providers import create_session, session_options
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.execution.slots import find_slots, is_past, present_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from alloc_moe.runtime.artifact.files import ArtifactFiles
    from alloc_moe.runtime.execution.calls import Session
    from alloc_moe.runtime.execution.slots import CacheSlot

    _Arrays = dict[str, NDArray[np.generic]]


@dataclass
class ArtifactRun:
    """Calls of an artifact that share a cache, and after they were run what they gave.

    ``calls`` are input_ids [batch, new tokens] and attention_mask [batch, all tokens so far], of a
    prompt first and then of one token per sequence. ``price`` is that of an activation, for
    artifacts with a dial; None is the one compiled in.
    """

    calls: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
    price: float | None
    logits: list[NDArray[np.floating]] = field(
        default_factory=list
    )  # per call, [batch, new, vocab]
    executed: list[int] = field(default_factory=list)  # experts per MoE layer, padding included
    chosen: list[list[NDArray[np.bool_]]] = field(
        default_factory=list
    )  # per MoE layer and call, [rows, experts]: which run; by `run_by_segments` only


def run_whole(path: Path, runs: Sequence[ArtifactRun], *, ep: Literal["cpu", "cuda"]) -> None:
    """Run all calls in one session, and fill in what `runs` lack."""
    run_session(open_session(path, ep=ep, count_activations=True, stop_spinning=True), runs)


def run_session(session: Session, runs: Sequence[ArtifactRun]) -> None:
    """Run all calls in a session that counts, and fill in what `runs` lack."""
    for run in runs:
        cache = session.empty_cache(len(run.calls[0][0]))
        counts = []
        for ids, mask in run.calls:
            output = session.run(ids, attention_mask=mask, cache=cache, price=run.price)
            run.logits.append(output.logits)
            counts.append(output.activations)
        run.executed = np.asarray(counts, np.int64).sum(0).tolist()


def run_by_segments(path: Path, runs: Sequence[ArtifactRun], *, limit: int) -> None:
    """Run all calls on the CPU, segment by segment, and fill in what `runs` lack.

    They get what `run_whole` gives on the CPU, bit for bit if activations are float32. Those of
    float16 are rounded at each cut: elsewhere onnxruntime keeps them in float32 from node to node.

    Args:
        path: The artifact.
        runs: What to run.
        limit: Bytes of weights that a segment may need, unless one operator needs more.

    Raises:
        ArtifactError: The artifact is incomplete, or onnxruntime can't load a segment of it.
    """
    artifact = _Artifact.load(path)
    inputs = (value.name or "" for value in artifact.model.graph.inputs)
    state = {name: present_name(name) for name in inputs if is_past(name)}
    segments = cut_graph(artifact.model.graph, limit, state=state)
    crossing: list[list[_Arrays]] = [[{} for _ in run.calls] for run in runs]
    for run in runs:
        run.executed = [0] * len(artifact.counted)
        run.chosen = [[] for _ in artifact.counted]
    for index, segment in enumerate(segments):
        needed = {value.name for later in segments[index + 1 :] for value in later.inputs}
        session = artifact.open_segment(extract_segment(artifact.model, segment, crossing[0][0]))
        for run, values in zip(runs, crossing, strict=True):
            for call, made in zip(values, session.run(run, values), strict=True):
                _collect(artifact, run, made)
                call.update(made)
                for name in call.keys() - needed:
                    del call[name]
        del session  # before the next takes its memory


@dataclass(frozen=True)
class _Artifact:
    """An artifact on disk, its graph, and the values that say which experts run in each layer."""

    files: ArtifactFiles
    model: ir.Model
    counted: tuple[str, ...]

    @classmethod
    def load(cls, path: Path) -> _Artifact:
        files = find_artifact(path)
        files.check_data()
        model = ir.load(files.graph)
        counted = counted_values(files)
        values = {output.name: output for node in model.graph for output in node.outputs}
        model.graph.outputs.extend(values[name] for name in counted)
        return cls(files, model, counted)

    def open_segment(self, segment: ir.Model) -> _SegmentSession:
        options = session_options(stop_spinning=True, data_folder=self.files.graph.parent)
        options.enable_cpu_mem_arena = False  # it keeps memory for calls to come
        content = ir.to_proto(segment).SerializeToString()
        session = create_session(content, options, ep="cpu", name=self.files.graph)
        slots = find_slots(
            session.get_inputs(),
            batch=str(self.model.graph.inputs[0].shape[0]),  # type: ignore[index]
            shared=SHARED_CACHE_KEY in self.files.onnx.metadata,
            path=self.files.graph,
            latent=LATENT_CACHE_KEY in self.files.onnx.metadata,
        )
        pads_right = PADDING_KEY in self.files.onnx.metadata
        return _SegmentSession(session, slots, pads_right=pads_right)


class _SegmentSession:
    """A segment loaded into onnxruntime, and the part of the cache that it has."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        slots: Sequence[CacheSlot],
        *,
        pads_right: bool,
    ) -> None:
        self._pads_right = pads_right
        outputs = [value.name for value in session.get_outputs()]
        presents = {slot.present for slot in slots}
        self._session = session
        self._inputs = [value.name for value in session.get_inputs() if not is_past(value.name)]
        self._optional = {
            value.name: len(value.shape) for value in session.get_overridable_initializers()
        }
        self._outputs = [name for name in outputs if name not in presents]
        self._slots = [slot for slot in slots if slot.present in outputs]
        # Of these it asks the shape only.
        self._measured = [slot for slot in slots if slot.present not in outputs]

    def run(self, run: ArtifactRun, crossing: Sequence[_Arrays]) -> Iterator[_Arrays]:
        """Yield what the segment makes in each call, from what earlier ones made, by name."""
        cache = Cache(self._slots, batch=len(run.calls[0][0]))
        dimensions = self._optional.get(PRICE_INPUT, 0)
        given = np.array(run.price, np.float32, ndmin=dimensions)
        price = {} if run.price is None else {PRICE_INPUT: given}
        for (ids, mask), values in zip(run.calls, crossing, strict=True):
            new = mask[:, -ids.shape[1] :]
            cache.reserve(cache.length + ids.shape[1])
            right = pad_right(ids, new, cache) if self._pads_right else None
            tokens = (
                cache.token_inputs(np.ascontiguousarray(ids), new)
                if right is None
                else right.inputs()
            )
            binding = self._binding(cache, {**values, **tokens, **price})
            self._session.run_with_iobinding(binding)
            found = binding.get_outputs()
            made = len(self._outputs)
            cache.append(new, None if cache.shared else found[made:])
            names = [*self._outputs, *(slot.present for slot in self._slots)]
            values = dict(zip(names, map(to_numpy, found), strict=True))
            if right is not None and "logits" in values:
                values["logits"] = right.spread(values["logits"])  # type: ignore[arg-type]
            yield values

    def _binding(self, cache: Cache, given: _Arrays) -> onnxruntime.IOBinding:
        binding = self._session.io_binding()
        for name in [*self._inputs, *(name for name in self._optional if name in given)]:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(given[name])
            binding.bind_ortvalue_input(name, value)
        for slot in self._measured:
            shape = slot.shape(cache.batch, cache.length)
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, slot.element_type)
            binding.bind_ortvalue_input(slot.past, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        cache.bind(binding)
        return binding


def _collect(artifact: _Artifact, run: ArtifactRun, made: _Arrays) -> None:
    """Take over from what a segment made the logits, and which experts were executed."""
    if "logits" in made:
        run.logits.append(made["logits"])  # type: ignore[arg-type]
    limits = most_executed(artifact.files.plan)
    for layer, (name, most) in enumerate(zip(artifact.counted, limits, strict=True)):
        if name in made:
            value: NDArray[np.floating] = made[name]  # type: ignore[assignment]
            run.executed[layer] += int(executed(name, value, most).sum())
            run.chosen[layer].append(value > least_executed(name))
