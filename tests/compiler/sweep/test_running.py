"""Artifacts on held-out text: how far they diverge from the full model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.reference.experts import under_plan
from alloc_moe.compiler.sweep import running
from alloc_moe.compiler.sweep.held_out import HeldOut
from alloc_moe.compiler.sweep.running import HeldOutRuns, divergences
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.console import Console

QUIET = Console(quiet=True)


def test_divergences_are_those_of_pytorch() -> None:
    random = np.random.default_rng(0)
    full, other = random.normal(0, 5, (2, 150, 40)).astype(np.float32)  # more than one block
    found = divergences(full, other)
    log = [torch.from_numpy(part).double().log_softmax(-1) for part in (full, other)]
    expected = torch.nn.functional.kl_div(log[1], log[0], log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    assert divergences(full, full + 3).max() < 1e-6  # a shift changes no probability


@pytest.fixture
def graphs(
    exported: Callable[[str], ir.Model],
    moe_model: Callable[[str], MoeModel],
    plan_for: Callable[..., AllocationPlan],
) -> Callable[[int], ir.Model]:
    """Return a function from k to the graph of the small OLMoE with it in all layers."""

    def make(k: int) -> ir.Model:
        plan = plan_for(moe_model("olmoe"), [k] * 3, redistribution="none")
        return specialize(exported("olmoe"), plan, device="cpu")

    return make


def runs(moe: MoeModel, folder: Path, ids: np.ndarray) -> HeldOutRuns:
    scored = HeldOut("text", "0" * 64, ids.astype(np.intc))
    return HeldOutRuns(scored, moe.layers, folder, 1, QUIET)


def test_a_plan_diverges_as_in_pytorch_and_the_full_model_not_at_all(
    moe_model: Callable[[str], MoeModel],
    plan_for: Callable[..., AllocationPlan],
    graphs: Callable[[int], ir.Model],
    tmp_path: Path,
) -> None:
    moe = moe_model("olmoe")
    length = moe.config.get_text_config().max_position_embeddings
    ids = np.random.default_rng(1).integers(0, 256, min(300, length))
    held_out = runs(moe, tmp_path, ids)
    full = held_out.run_full(graphs(4))
    again = held_out.run(graphs(4))
    assert again["divergence"] == pytest.approx(0, abs=1e-9)
    assert again["loss"] == pytest.approx(full["loss"], rel=1e-6)
    found = held_out.run(graphs(1))
    tokens = torch.from_numpy(ids)[None]
    with torch.no_grad():
        before = moe.model(input_ids=tokens).logits[0, :-1].double().log_softmax(-1)
        with under_plan(moe, plan_for(moe, [1] * 3, redistribution="none")):
            now = moe.model(input_ids=tokens).logits[0, :-1].double().log_softmax(-1)
    expected = float((before.exp() * (before - now)).sum(-1).mean())
    assert expected > 1e-4
    assert found["divergence"] == pytest.approx(expected, rel=1e-3)
    assert found["per_layer"] == [1, 1, 1]


def test_each_token_is_compared_once_where_windows_overlap(
    moe_model: Callable[[str], MoeModel],
    graphs: Callable[[int], ir.Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = np.random.default_rng(1).integers(0, 256, 250)
    monkeypatch.setattr(running, "default_window", lambda _: 100)
    moe = moe_model("olmoe")
    held_out = runs(moe, tmp_path, ids)
    held_out.run_full(graphs(4))
    vocabulary = moe.config.get_text_config().vocab_size
    assert (tmp_path / "logits").stat().st_size == 249 * vocabulary * 4
    assert held_out.run(graphs(4))["divergence"] == pytest.approx(0, abs=1e-9)
    assert held_out.run(graphs(1))["divergence"] > 1e-4


def test_logits_that_take_too_much_are_not_kept(
    moe_model: Callable[[str], MoeModel],
    graphs: Callable[[int], ir.Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(running, "_MOST_BYTES", 1000)
    scored = HeldOut("text", "0" * 64, np.arange(20, dtype=np.intc))
    held_out = HeldOutRuns(scored, moe_model("olmoe").layers, tmp_path, 1, Console())
    held_out.run_full(graphs(4))
    assert held_out.run(graphs(1))["divergence"] is None
    assert "Divergences are left out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
