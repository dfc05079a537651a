"""Models that don't fit in memory: what fits is decided, and built to read layers when they run."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from transformers import GenerationConfig

from alloc_moe.compiler.layer_weights import WeightSource, offload_layer, resident
from alloc_moe.compiler.replay import find_decoder_layers
from alloc_moe.compiler.skeleton import build_empty
from alloc_moe.runtime.command import duration

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedConfig, PreTrainedModel

    from alloc_moe.compiler.checkpoint import CheckpointReader
    from alloc_moe.compiler.records import MoeLayer, MoeModel, OffloadMode
    from alloc_moe.runtime.command import Console

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


def expected_time(moe: MoeModel, *, passes: float, gflop: float) -> str:
    """Say what passes over all layers of an offloaded model, and their computing, will take."""
    assert moe.offloading is not None
    reading, computing = moe.offloading.seconds * passes, gflop / _gflop_per_second()
    return (
        f"about {duration(reading + computing)} (reading all layers {passes:.3g} times: "
        f"{duration(reading)}, computing: {duration(computing)} at best)"
    )


@contextlib.contextmanager
def layers_progress(
    console: Console, description: str, moe: MoeModel, *, passes: int
) -> Iterator[None]:
    """Report each decoder layer that an offloaded model has run, while the block lasts.

    Args:
        console: Where to.
        description: What is being done.
        moe: The model; one in memory counts as a single step.
        passes: How often all its layers will run.
    """
    if moe.offloading is None:
        with console.step(description):
            yield
        return
    layers = len(find_decoder_layers(moe.skeleton, moe.layers[0]))
    source = moe.offloading.source
    with console.progress(description, passes * layers, unit="layers") as progress:
        source.on_layer = progress.advance
        try:
            yield
        finally:
            source.on_layer = lambda _: None


def forward_gflop(moe: MoeModel, tokens: int) -> float:
    """Return the GFLOP of running the decoder layers for so many tokens, roughly."""
    layers = find_decoder_layers(moe.skeleton, moe.layers[0])
    active = float(sum(parameter.numel() for parameter in layers.parameters()))
    for layer in moe.layers:
        experts = moe.skeleton.get_submodule(layer.experts_name).parameters()
        idle = 1 - layer.experts_per_token / layer.num_experts
        active -= idle * sum(parameter.numel() for parameter in experts)
    return 2e-9 * active * tokens


def _gflop_per_second() -> float:
    """Measure how fast this process multiplies matrices."""
    a, b = torch.ones(256, 1024), torch.ones(1024, 1024)
    best = min(_seconds(a, b) for _ in range(4))  # the first is slow
    return 2e-9 * a.numel() * len(b) / best


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    a @ b
    return time.perf_counter() - start


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


def load_offloaded(
    config: PreTrainedConfig,
    folder: Path,
    reader: CheckpointReader,
    layers: Sequence[MoeLayer],
    *,
    forced: bool,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Offloading]:
    """Return a float32 model that holds embeddings and head, but no decoder layer's weights.

    Args:
        config: The model's configuration.
        folder: The checkpoint.
        reader: Reads its weights.
        layers: The MoE layers.
        forced: Whether the user asked for it.
        trust_remote_code: As for `load_model`.
    """
    free = available_memory()
    model = build_empty(config, torch.float32, trust_remote_code=trust_remote_code).eval()
    model.requires_grad_(False)
    source = WeightSource(reader)
    stack = find_decoder_layers(model, layers[0])
    prefix = next(name for name, module in model.named_modules() if module is stack) + "."
    _read_all_but(model, source, prefix)
    for index, layer in enumerate(stack):
        offload_layer(layer, source, f"{prefix}{index}.")
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:  # the checkpoint has none: transformers then takes it from the configuration
        model.generation_config = GenerationConfig.from_model_config(config)
    start = time.monotonic()
    with resident(stack[layers[0].decoder_layer]):
        seconds = (time.monotonic() - start) * len(stack)
    return model, Offloading(source, weights_bytes(model), free, seconds, forced)


def _read_all_but(model: PreTrainedModel, source: WeightSource, prefix: str) -> None:
    """Read what is in no decoder layer, and all buffers that the checkpoint has."""
    read: dict[int, torch.nn.Parameter] = {}
    names = set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        names.add(name)
        if name.startswith(prefix):
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
