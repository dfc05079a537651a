"""An artifact in onnxruntime: tokens in, logits out, keys and values appended to a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
from numpy.typing import ArrayLike, NDArray

from alloc_moe.runtime.artifact.counting import counted_values, executed, most_executed
from alloc_moe.runtime.artifact.dial import Price
from alloc_moe.runtime.artifact.files import ArtifactFiles, find_artifact
from alloc_moe.runtime.artifact.plan import (
    LATENT_CACHE_KEY,
    LOGITS_TO_KEEP_INPUT,
    PADDING_KEY,
    PRICE_INPUT,
    SHARED_CACHE_KEY,
    AllocationPlan,
)
from alloc_moe.runtime.errors import ArtifactError, GenerationError
from alloc_moe.runtime.execution.buffers import to_numpy
from alloc_moe.runtime.execution.cache import Cache
from alloc_moe.runtime.execution.calls import Output, Session, begin_call, check_room
from alloc_moe.runtime.execution.opening import check_io, check_past, own_kernels, session_model
from alloc_moe.runtime.execution.padding import goes_row_by_row, pad_right
from alloc_moe.runtime.execution.providers import (
    CUDA,
    ORT_ERRORS,
    Provider,
    create_session,
    ort_message,
    quiet_run,
    session_options,
    tries_cuda,
)
from alloc_moe.runtime.execution.slots import find_slots
from alloc_moe.runtime.execution.step_programs.kernels import OwnKernels
from alloc_moe.runtime.execution.step_programs.programs import check_graph
from alloc_moe.runtime.execution.torch_programs.session import open_program


class ArtifactSession:
    """An artifact loaded into onnxruntime. Get one from `open_session`."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        files: ArtifactFiles,
        *,
        counting: bool,
        kernels: OwnKernels | None = None,
    ) -> None:
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = {value.name: value for value in session.get_outputs()}
        check_io(set(inputs), set(outputs), path=files.graph)
        self.files = files
        self.device: Literal["cpu", "cuda"] = "cuda" if CUDA in session.get_providers() else "cpu"
        self.shares_cache = SHARED_CACHE_KEY in files.onnx.metadata
        self.pads_right = PADDING_KEY in files.onnx.metadata
        latent = LATENT_CACHE_KEY in files.onnx.metadata
        self.slots = find_slots(
            inputs.values(),
            batch=inputs["input_ids"].shape[0],
            shared=self.shares_cache,
            path=files.graph,
            latent=latent,
        )
        # GroupQueryAttention continues several sequences by one token each only.
        self._continues_rows = not self.shares_cache or latent
        self.context_length = files.context_length()
        vocabulary = outputs["logits"].shape[-1]
        self.vocabulary = vocabulary if isinstance(vocabulary, int) else None
        self._session = session
        self._run_options = quiet_run()
        optional = {value.name: value for value in session.get_overridable_initializers()}
        self.has_dial = PRICE_INPUT in optional
        self.takes_prices = self.has_dial and len(optional[PRICE_INPUT].shape) == 1
        self._keeps_logits = LOGITS_TO_KEEP_INPUT in optional
        self._inputs = frozenset(inputs)
        self._counted = counted_values(files) if counting else ()
        self._kernels = kernels if self.device == "cuda" and self.pads_right else None
        if self._kernels is not None:
            program = self._kernels.stepper.program
            check_graph(program, self.slots, self.vocabulary, path=files.graph)
            bounds = (self.context_length, self._kernels.positions)
            self.context_length = min((each for each in bounds if each), default=None)

    @property
    def captures(self) -> bool:
        """Whether decode steps are replayed as one CUDA graph of kernels of our own."""
        return self._kernels is not None

    @property
    def plan(self) -> AllocationPlan:
        """The plan that was compiled in."""
        return self.files.plan

    @property
    def counts_activations(self) -> bool:
        """Whether every call says how many experts each layer executed."""
        return bool(self._counted)

    def empty_cache(self, batch: int, *, capacity: int = 0) -> Cache:
        """Return the cache to start a batch with.

        Args:
            batch: The number of sequences.
            capacity: Columns to have room for from the start. A cache grows as it needs to, but
                then it is copied, each time to twice its size.

        Raises:
            GenerationError: There is no sequence, or less than no room.
        """
        check_room(batch, capacity)
        device = "cpu" if self.shares_cache and not self.pads_right else self.device
        return Cache(self.slots, batch=int(batch), capacity=int(capacity), device=device)

    def run(
        self,
        input_ids: ArrayLike,
        *,
        attention_mask: ArrayLike | None = None,
        cache: Cache | None = None,
        price: float | Sequence[float] | None = None,
        logits_to_keep: int | None = None,
    ) -> Output:
        """Run one call: a whole prompt, a piece of it, or one token per sequence.

        Args:
            input_ids: [batch, sequence].
            attention_mask: [batch, cache.length + sequence], 1 = real token, 0 = padding, which is
                on the left of each row or anywhere else. The columns before the last `sequence`
                are as they were when they were new. All ones by default. A row without any real
                token so far has logits that mean nothing, as all padding has.
            cache: From `empty_cache`, or the one of the call before; an empty one by default. The
                call appends to it.
            price: For artifacts with a dial: of an activation, in place of the one compiled in. See
                `alloc_moe.runtime.artifact.dial.price_of`. One for all sequences, or one each
                [batch], which artifacts compiled with ``--price-per sequence`` take.
            logits_to_keep: Return logits of so many positions at the end; by default of all.

        Raises:
            GenerationError: There is a price, but no dial, or there are several, which the artifact
                doesn't take; ids, mask and cache don't belong together; the context is too short;
                or tokens that compete for experts would have to be run apart.
            ArtifactError: onnxruntime can't run the graph.
        """
        call = begin_call(self, input_ids, attention_mask, cache, price, logits_to_keep)
        ids, new, cache, checked, keep = call
        batch, sequence = ids.shape
        optional = (checked, keep)
        if self._kernels is not None and self._kernels.takes(ids, new, keep):
            logits = self._kernels.run(ids, new, cache, checked)
            cache.append(new)
            return Output(logits, cache, None)
        if cache.length and self.device == "cuda" and self.pads_right:
            check_past(self.slots, path=self.files.graph)
        apart = not self._continues_rows and batch > 1 and sequence > 1 and cache.length
        if goes_row_by_row(new, cache) if self.pads_right else apart:
            return self._run_rows(ids, new, cache, optional)
        return self._run(ids, new, cache, optional)

    def _run(
        self,
        ids: NDArray[np.int64],
        new: NDArray[np.int64],
        cache: Cache,
        optional: tuple[Price, int | None],
    ) -> Output:
        price, keep = optional
        right = pad_right(ids, new, cache) if self.pads_right else None
        if right is not None and keep is not None and 1 < right.ids.shape[1] <= keep:
            keep = None
        binding = self._binding(cache, (price, keep))
        tokens = cache.token_inputs(ids, new) if right is None else right.inputs()
        for name, array in tokens.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, array)
        for name in ("logits", *self._counted):
            binding.bind_output(name, "cpu")
        if self.shares_cache:
            cache.states.bind(binding)
        else:
            cache.bind(binding)
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except ORT_ERRORS as error:
            raise ArtifactError(
                f"onnxruntime can't run {self.files.graph}: {ort_message(error)} "
                "Compile the model again, or with another version of onnxruntime."
            ) from error
        logits, probs, present = _split(binding.get_outputs(), len(self._counted))
        cache.append(new, None if self.shares_cache else present)
        kept = to_numpy(logits)
        if right is not None:
            kept = right.spread(kept, keep=optional[1])
        elif keep and not self._keeps_logits:
            kept = kept[:, -keep:]
        arrays = map(to_numpy, probs)
        limits = most_executed(self.plan)
        rows = tuple(map(executed, self._counted, arrays, limits)) if self._counted else None
        return Output(kept, cache, rows)

    def _run_rows(
        self,
        ids: NDArray[np.int64],
        new: NDArray[np.int64],
        cache: Cache,
        optional: tuple[Price, int | None],
    ) -> Output:
        """Continue several sequences by several tokens each, one sequence after the other.

        GroupQueryAttention takes no more than one then. Nothing depends on the others unless tokens
        of a call compete.
        """
        if self.plan.tokens_compete:
            raise GenerationError(
                f"{len(ids)} sequences can't be continued by {ids.shape[1]} tokens each in one "
                f"call: in {self.files.graph} the tokens of a call compete for experts, and its "
                "attention takes such sequences one by one. Give one token per sequence, or one "
                "sequence per call."
            )
        parts = {
            row: self._run(
                ids[row : row + 1], new[row : row + 1], cache.row(row), _of_row(optional, row)
            )
            for row in range(len(ids))
            if new[row].any() or not self.pads_right
        }
        cache.append(new)
        first = next(iter(parts.values())).logits
        logits = np.zeros((len(ids), *first.shape[1:]), first.dtype)
        for row, part in parts.items():
            logits[row] = part.logits[0]
        counted = zip(*(part.rows for part in parts.values() if part.rows is not None), strict=True)
        rows = tuple(np.concatenate(each) for each in counted) if self._counted else None
        return Output(logits, cache, rows)

    def _binding(self, cache: Cache, optional: tuple[Price, int | None]) -> onnxruntime.IOBinding:
        """Return the cache's binding; what stays from call to call is bound once."""
        if cache.binding is not None and cache.bound_inputs == optional:
            return cache.binding
        price, keep = optional
        if cache.binding is not None and price is not None:
            before, kept = cache.bound_inputs
            if before is not None and kept == keep:
                self._bind_price(cache.binding, price)
                cache.bound_inputs = optional
                return cache.binding
        binding = self._session.io_binding()
        if price is not None:
            self._bind_price(binding, price)
        if keep is not None and self._keeps_logits:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([keep], np.int64))
            binding.bind_ortvalue_input(LOGITS_TO_KEEP_INPUT, value)
        for name in ("logits", *self._counted):  # first, so that they are the first outputs
            binding.bind_output(name, "cpu")
        if self.shares_cache:
            cache.bind(binding)
        cache.binding, cache.bound_inputs = binding, optional
        return binding

    def _bind_price(self, binding: onnxruntime.IOBinding, price: float | tuple[float, ...]) -> None:
        array = np.array(price, np.float32, ndmin=int(self.takes_prices))
        # bind_cpu_input takes required inputs only.
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(PRICE_INPUT, value)


def open_session(
    path: str | Path,
    *,
    ep: Provider = "auto",
    threads: int | None = None,
    count_activations: bool = False,
    stop_spinning: bool = False,
    more_options: Mapping[str, str] | None = None,
    capture: bool = True,
) -> Session:
    """Load an artifact into onnxruntime, or one of torch into that.

    Args:
        path: A bundle folder, or an .onnx, .pt or .pt2 file.
        ep: Execution provider; ``auto`` is CUDA if it can be used, else the CPU.
        threads: Threads that share the work of one operator; by default one per physical core.
        count_activations: Have every call say how many experts each layer executed.
        stop_spinning: Let idle threads sleep between calls. Slower by a few microseconds per
            call, but sessions in one process, or other work between calls, disturb each other less.
        more_options: What else onnxruntime can be told, see `session_options`.
        capture: On CUDA, compute decode steps by kernels of our own in one captured graph, where
            the artifact has a step program; else onnxruntime does, and the log says why.

    Raises:
        ArtifactError: Something is missing, damaged, or was not compiled by alloc-moe.
        DeviceError: ``ep="cuda"``, but CUDA can't be used.
        GenerationError: onnxruntime has no such option.
    """
    files = find_artifact(path)
    if files.is_torch:
        return open_program(
            files, ep=ep, threads=threads, counting=count_activations, more=more_options
        )
    data = files.check_data()
    model, folder = session_model(files, data, counting=count_activations)
    options = session_options(
        threads=threads, stop_spinning=stop_spinning, data_folder=folder, more=more_options
    )
    kernels = None
    if capture and not count_activations and tries_cuda(ep):
        kernels = own_kernels(files, data, options)
    session = create_session(model, options, ep=ep, name=files.graph)
    return ArtifactSession(session, files, counting=count_activations, kernels=kernels)


def _of_row(optional: tuple[Price, int | None], row: int) -> tuple[Price, int | None]:
    """Return what a call is given besides its tokens, for one of its sequences."""
    price, keep = optional
    return (price[row] if isinstance(price, tuple) else price), keep


def _split(
    values: Sequence[onnxruntime.OrtValue], counted: int
) -> tuple[onnxruntime.OrtValue, Sequence[onnxruntime.OrtValue], Sequence[onnxruntime.OrtValue]]:
    """Return logits, router probabilities of the layers, cache."""
    return values[0], values[1 : 1 + counted], values[1 + counted :]
