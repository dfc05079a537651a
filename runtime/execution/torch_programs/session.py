"""An artifact in torch, behind the same functions as one in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnxruntime
from numpy.typing import ArrayLike, NDArray

from alloc_moe.runtime.artifact.files import ArtifactFiles
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.errors import ArtifactError, DeviceError, GenerationError
from alloc_moe.runtime.execution.buffers import BFLOAT16, FLOAT
from alloc_moe.runtime.execution.cache import Cache
from alloc_moe.runtime.execution.calls import Output, begin_call, check_room
from alloc_moe.runtime.execution.providers import Provider, check_provider, check_threads
from alloc_moe.runtime.execution.slots import CacheSlot, present_name
from alloc_moe.runtime.execution.torch_programs.loading import Interface, Run, load_program

if TYPE_CHECKING:
    import torch

_ELEMENTS = {"float32": FLOAT, "bfloat16": BFLOAT16}
_PARTS = ("key", "value")


class TorchSession:
    """An artifact loaded into torch, on the CPU. Get one from `open_session`."""

    device: Literal["cpu"] = "cpu"
    pads_right = False
    takes_prices = False

    def __init__(
        self, run: Run, files: ArtifactFiles, interface: Interface, *, counting: bool
    ) -> None:
        self.files = files
        self.slots = _slots(interface)
        self.context_length = files.context_length()
        self.vocabulary: int | None = interface.vocabulary
        self.has_dial = interface.has_dial
        self.counts_activations = counting
        self._run = run

    @property
    def plan(self) -> AllocationPlan:
        """The plan that was compiled in."""
        return self.files.plan

    def empty_cache(self, batch: int, *, capacity: int = 0) -> Cache:
        """Return the cache to start a batch with; its tensors are new ones at every call.

        Raises:
            GenerationError: There is no sequence, or less than no room.
        """
        check_room(batch, capacity)
        return Cache(self.slots, batch=int(batch), capacity=int(capacity))

    def run(
        self,
        input_ids: ArrayLike,
        *,
        attention_mask: ArrayLike | None = None,
        cache: Cache | None = None,
        price: float | Sequence[float] | None = None,
        logits_to_keep: int | None = None,
    ) -> Output:
        """Run one call; arguments are those of `ArtifactSession.run`.

        Raises:
            GenerationError: What was given doesn't belong together.
            ArtifactError: torch can't run the program.
        """
        import torch

        call = begin_call(self, input_ids, attention_mask, cache, price, logits_to_keep)
        ids, new, cache, checked, keep = call
        tokens = cache.token_inputs(ids, new)
        names = ("input_ids", "attention_mask", "position_ids")
        arguments = [torch.from_numpy(tokens[name]) for name in names]
        past = [torch.utils.dlpack.from_dlpack(value) for value in cache.values]
        try:
            with torch.inference_mode():
                logits, present, counts = self._run(*arguments, past, checked, keep or 0)
        except RuntimeError as error:
            reason = str(error).strip().rpartition("\n")[2]
            raise ArtifactError(
                f"torch {torch.__version__} can't run {self.files.graph}: {reason} "
                "Compile the model again, or with another version of torch."
            ) from error
        cache.append(new, [_held(tensor) for tensor in present])
        executed = tuple(counts.numpy()) if self.counts_activations else None
        return Output(_floats(logits), cache, executed)


def open_program(
    files: ArtifactFiles,
    *,
    ep: Provider = "cpu",
    threads: int | None = None,
    counting: bool = False,
    more: Mapping[str, str] | None = None,
) -> TorchSession:
    """Load an artifact of TorchScript or torch.export.

    Args:
        files: Its files.
        ep: ``auto`` is the CPU.
        threads: Threads that share the work of one operator, for all of torch in this process.
        counting: Have every call say how many experts each layer executed.
        more: Options of onnxruntime, of which it takes none.

    Raises:
        ArtifactError: It is damaged, or torch is missing.
        DeviceError: ``ep="cuda"``.
        GenerationError: There are options of onnxruntime, or no such provider or number of
            threads.
    """
    check_provider(ep)
    if ep == "cuda":
        raise DeviceError(
            f"{files.graph} runs in torch on the CPU only. Leave --ep out, or compile the model "
            "with --device cuda to an .onnx file."
        )
    if more:
        raise GenerationError(
            f"{files.graph} runs in torch, which has no option {min(more)} of onnxruntime's "
            "sessions. Leave --session out."
        )
    check_threads(threads)
    interface = Interface.read(files)
    run = load_program(files.graph, has_dial=interface.has_dial)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return TorchSession(run, files, interface, counting=counting)


def _slots(interface: Interface) -> tuple[CacheSlot, ...]:
    slots = []
    for index, tensor in enumerate(interface.cache):
        past = f"past_key_values.{index // 2}.{_PARTS[index % 2]}"
        free = {0: 1, tensor.past_axis: 0}
        slots.append(
            CacheSlot(
                past=past,
                present=present_name(past),
                empty_shape=tuple(free.get(a, s or 0) for a, s in enumerate(tensor.sizes)),
                batch_axis=0,
                past_axis=tensor.past_axis,
                element_type=_ELEMENTS[interface.dtype],
            )
        )
    return tuple(slots)


def _held(tensor: torch.Tensor) -> onnxruntime.OrtValue:
    """Return a tensor as the cache holds it, in the same memory."""
    return onnxruntime.OrtValue.from_dlpack(tensor.contiguous())


def _floats(logits: torch.Tensor) -> NDArray[np.floating]:
    """Return logits as an array; numpy has no bfloat16."""
    array: NDArray[np.floating] = logits.float().numpy()
    return array
