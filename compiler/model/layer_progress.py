"""How long passes over an offloaded model's layers take, and how far they are."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.model.replay import find_decoder_layers
from alloc_moe.runtime.console import duration

if TYPE_CHECKING:
    from collections.abc import Iterator

    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.runtime.console import Console


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
        passes: How often all its layers will run. Each further pass adds to the total.
    """
    if moe.offloading is None:
        with console.step(description):
            yield
        return
    layers = len(find_decoder_layers(moe.checkpoint.skeleton, moe.layers[0]))
    source = moe.offloading.source
    with console.progress(description, passes * layers, unit="layers") as progress:

        def advance(count: int) -> None:
            progress.expect_more(layers)  # a pass that wasn't foreseen: near-ties run again
            progress.advance(count)

        source.on_layer = advance
        try:
            yield
        finally:
            source.on_layer = lambda _: None


def forward_gflop(moe: MoeModel, tokens: int) -> float:
    """Return the GFLOP of running the decoder layers for so many tokens, roughly."""
    layers = find_decoder_layers(moe.checkpoint.skeleton, moe.layers[0])
    active = float(sum(parameter.numel() for parameter in layers.parameters()))
    for layer in moe.layers:
        experts = moe.checkpoint.skeleton.get_submodule(layer.experts_name).parameters()
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
