"""Models that don't fit in memory: what fits is decided, and built to read layers when they run."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from alloc_moe.compiler.model.checkpoint import read_generation_config
from alloc_moe.compiler.model.layer_weights import WeightSource, offload_layer, resident
from alloc_moe.compiler.model.replay import find_decoder_layers
from alloc_moe.compiler.model.skeleton import build_empty
from alloc_moe.runtime.console import duration

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alloc_moe.compiler.model.checkpoint import Checkpoint
    from alloc_moe.compiler.records import OffloadMode

# The model, and as much again: onnxruntime loads the artifact that is verified against it.
_NEEDED = 2.0


@dataclass(frozen=True)
class Offloading:
    """Decoder layers are read from the checkpoint when they run.

    ``seconds`` is about what reading all of them takes, from reading one; ``source`` reads them.
    """

    source: WeightSource
    weights_bytes: int
    free_bytes: int
    seconds: float
    forced: bool

    def describe(self) -> str:
        """Say what was chosen, why, and what it costs."""
        reads = f"in about {duration(self.seconds)} each time all of them run"
        size = f"{_gib(self.weights_bytes)} GiB of float32 weights"
        if self.forced:
            return f"As asked, decoder layers are read from disk when they run ({size}), {reads}"
        return (
            f"{size} and an artifact as large may not fit in the {_gib(self.free_bytes)} GiB of "
            f"memory that are free: decoder layers are read from disk when they run, {reads}. "
            "--offload never keeps them in memory"
        )


def wants_offloading(skeleton: PreTrainedModel, mode: OffloadMode) -> bool:
    """Whether a model's decoder layers shall be read when they run."""
    if mode == "auto":
        return _NEEDED * weights_bytes(skeleton) > available_memory()
    return mode == "always"


def weights_bytes(skeleton: PreTrainedModel) -> int:
    """Return the bytes of a model's parameters, shared ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in skeleton.parameters())


def available_memory() -> int:
    """Return the bytes that this process may still take, in a container and beside others too."""
    free = int(psutil.virtual_memory().available)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text("ascii").strip()).isdigit():
        free = min(free, int(text) - psutil.Process().memory_info().rss)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun


def load_offloaded(checkpoint: Checkpoint, *, forced: bool) -> tuple[PreTrainedModel, Offloading]:
    """Return a float32 model that holds embeddings and head, but no decoder layer's weights.

    Args:
        checkpoint: Where they are read from.
        forced: Whether the user asked for it.
    """
    config, layers = checkpoint.config, checkpoint.layers
    free = available_memory()
    model = build_empty(
        config, torch.float32, trust_remote_code=checkpoint.trust_remote_code
    ).eval()
    model.requires_grad_(False)
    source = WeightSource(checkpoint.reader)
    stack = find_decoder_layers(model, layers[0])
    prefix = next(name for name, module in model.named_modules() if module is stack) + "."
    read_weights(model, source, but=(prefix,))
    for index, layer in enumerate(stack):
        offload_layer(layer, source, f"{prefix}{index}.")
    model.generation_config = read_generation_config(checkpoint)
    start = time.monotonic()
    with resident(stack[layers[0].decoder_layer]):
        seconds = (time.monotonic() - start) * len(stack)
    return model, Offloading(source, weights_bytes(model), free, seconds, forced)


def read_weights(
    model: PreTrainedModel, source: WeightSource, *, but: tuple[str, ...] = ()
) -> None:
    """Give a model the parameters that begin with none of `but`, and the checkpoint's buffers."""
    read: dict[int, torch.nn.Parameter] = {}
    names = set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        names.add(name)
        if name.startswith(but):
            continue
        if id(parameter) not in read:
            weight = source.read(name, parameter.dtype)
            read[id(parameter)] = torch.nn.Parameter(weight, requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, read[id(parameter)])
    for name, buffer in model.state_dict(keep_vars=True).items():
        if name not in names:
            buffer.copy_(source.read(name, buffer.dtype))


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
