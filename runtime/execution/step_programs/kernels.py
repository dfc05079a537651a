"""Whether an artifact's decode steps run by kernels of our own, and what they need if they do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.artifact.dial import Price
from alloc_moe.runtime.artifact.tensors import from_bfloat16, read_initializers
from alloc_moe.runtime.cuda import bindings
from alloc_moe.runtime.cuda.device import Device
from alloc_moe.runtime.cuda.prefiller import Prefiller
from alloc_moe.runtime.cuda.stepper import CacheMemory, Stepper
from alloc_moe.runtime.cuda.weights import Weights
from alloc_moe.runtime.errors import DeviceError
from alloc_moe.runtime.execution.padding import pad_right
from alloc_moe.runtime.execution.step_programs.programs import (
    check_program,
    prefill_obstacle,
    quantized_names,
    step_program,
    weight_names,
)

if TYPE_CHECKING:
    import onnxruntime

    from alloc_moe.runtime.artifact.files import ArtifactFiles
    from alloc_moe.runtime.execution.cache import Cache

logger = logging.getLogger(__name__)


class OwnKernels:
    """An artifact's weights on the GPU and what runs its decode steps with them."""

    def __init__(
        self,
        program: Mapping[str, Any],
        files: ArtifactFiles,
        data: Mapping[str, Path],
        device: Device,
    ) -> None:
        if device.capability < bindings.LEAST_CAPABILITY:
            raise DeviceError(f"the GPU's compute capability is {device.capability}, below 8.0")
        initializers = read_initializers(files.graph, data, weight_names(program))
        check_program(program, initializers)
        self._weights = Weights(device, initializers)
        rounded = quantized_names(program)
        self._shared = [name for name in initializers if name not in rounded]
        self.stepper = Stepper(
            device, program, weights=self._weights.address, floats=self._weights.floats
        )
        self._prefiller = Prefiller(device, self.stepper)
        self.prefill_obstacle = prefill_obstacle(
            program,
            redistribution=files.plan.redistribution,
            most_shared=device.most_shared,
        )
        """Why onnxruntime computes prompts, None if own kernels do."""

    @property
    def positions(self) -> int | None:
        """How many the tables of the rotary embedding have; None if nothing is looked up."""
        positions: int | None = self.stepper.program.get("context_length")
        return positions

    def takes(
        self, ids: NDArray[np.int64], new: NDArray[np.int64], logits_to_keep: int | None
    ) -> bool:
        """Whether a call is one that the kernels compute: a step, or a prompt's last logits."""
        batch, width = ids.shape
        if batch > self.stepper.most_sequences:
            return False
        if width == 1:
            return True
        prompt = logits_to_keep == 1 and bool(new[:, -1].all())
        return self.prefill_obstacle is None and prompt

    def run(
        self, ids: NDArray[np.int64], new: NDArray[np.int64], cache: Cache, price: Price
    ) -> NDArray[np.floating]:
        """Return the logits [batch, 1, vocabulary] of each sequence's last token.

        The cache gets its key and value, but counts them only by `append`.

        Args:
            ids: [batch, width].
            new: Their mask, of the same shape.
            cache: On the device, with room for them.
            price: In place of the one compiled in; one, or one per sequence.
        """
        memory = cache.place
        if not isinstance(memory, CacheMemory):
            cache.place = memory = _memory(cache)
        if ids.shape[1] == 1:
            real = new[:, 0]
            logits = self.stepper.step(ids[:, 0], cache.real_tokens, real, memory, price=price)
        else:
            right = pad_right(ids, new, cache)
            past = cache.real_tokens
            logits = self._prefiller.run(right.ids, new.sum(axis=1), past, memory, price=price)
        if logits.dtype == np.uint16:
            logits = from_bfloat16(logits)
        return logits[:, None]

    def share(self, options: onnxruntime.SessionOptions) -> None:
        """Have a session use the same weights."""
        self._weights.share(options, self._shared)


def _memory(cache: Cache) -> CacheMemory:
    where = cache.addresses()
    layers = range(len(where) // 2)
    keys, values = (
        tuple(where[f"past_key_values.{layer}.{kind}"] for layer in layers)
        for kind in ("key", "value")
    )
    return CacheMemory(keys, values, cache.capacity)


def open_kernels(files: ArtifactFiles, data: Mapping[str, Path]) -> OwnKernels | str:
    """Return what runs an artifact's decode steps, or why onnxruntime has to."""
    program = step_program(files.onnx.metadata)
    obstacle = bindings.missing()
    if isinstance(program, str) or obstacle:
        return obstacle if obstacle else str(program)
    try:
        return OwnKernels(program, files, data, Device())
    except DeviceError as error:
        return str(error).rstrip(".")
