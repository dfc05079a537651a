"""Layers of an offloaded model are counted as they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alloc_moe.compiler.model.layer_progress import layers_progress
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.runtime.console import Console, Progress

Models = Callable[[str], MoeModel]


def test_each_layer_that_ran_is_reported(
    checkpoint: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    moe = load_model(str(checkpoint("olmoe")), offload="always")
    ids = torch.zeros(1, 3, dtype=torch.long)
    stack = DecoderStack(moe.model, moe.layers[0])
    with layers_progress(Console(), "Trying", moe, passes=2):
        stack.run(ids, None, start=0, stop=len(stack))
        with stack.resident(0):
            stack.run(ids, None, start=0, stop=2)
    stack.run(ids, None, start=0, stop=1)  # no longer counted
    assert f"Trying: {len(stack) + 2} layers in" in capfd.readouterr().err


def test_passes_that_were_not_foreseen_add_to_the_total(
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    moe = load_model(str(checkpoint("olmoe")), offload="always")
    assert moe.offloading is not None
    layers = len(DecoderStack(moe.model, moe.layers[0]))
    states: list[str] = []
    advance = Progress.advance

    def watched(progress: Progress, n: int) -> None:
        advance(progress, n)
        states.append(progress.state().partition(" ")[0])

    monkeypatch.setattr(Progress, "advance", watched)
    with layers_progress(Console(), "Trying", moe, passes=1):
        for _ in range(2 * layers):  # the second pass is that of near-ties, say
            moe.offloading.source.on_layer(1)
    totals = [layers] * layers + [2 * layers] * layers
    assert states == [f"{done}/{total}" for done, total in enumerate(totals, start=1)]
    assert f"Trying: {2 * layers} layers in" in capfd.readouterr().err


def test_a_model_in_memory_is_one_step(
    moe_model: Models, capfd: pytest.CaptureFixture[str]
) -> None:
    with layers_progress(Console(), "Trying", moe_model("olmoe"), passes=2):
        pass
    assert "Trying: 1 step in" in capfd.readouterr().err
