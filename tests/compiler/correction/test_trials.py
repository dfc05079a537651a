"""Trials that begin at a kept state give what whole runs give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alloc_moe.compiler.correction.fitting import fit_corrections
from alloc_moe.compiler.correction.trials import CorrectionTrials, Running
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.reference.policies import LayerParameters
from alloc_moe.compiler.workspace.results import SavedResults

Models = Callable[[str], MoeModel]


def half_of(moe: MoeModel) -> tuple[torch.Tensor, Running]:
    ids = torch.randint(0, 250, (4, 32), generator=torch.Generator().manual_seed(3))
    half = [LayerParameters(max(1, layer.experts_per_token // 2)) for layer in moe.layers]
    return ids, Running(half, "none", "keep")


def test_a_damaged_state_is_computed_again(moe_model: Models, tmp_path: Path) -> None:
    moe = moe_model("olmoe")
    ids, running = half_of(moe)
    moe = dataclasses.replace(moe, results=SavedResults(tmp_path / "passes"))
    trials = CorrectionTrials(moe, ids, running, tokens_per_batch=64)
    none = [None] * len(moe.layers)
    whole = trials.losses(none, keep=True)
    for file in (tmp_path / "passes").iterdir():
        file.write_bytes(b"")
    assert torch.equal(trials.losses(none, start=2), whole)


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_a_trial_from_a_kept_state_equals_a_whole_run(
    moe_model: Models, tmp_path: Path, family: str, in_files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = moe_model(family)
    ids, running = half_of(moe)
    fitted = fit_corrections(moe, ids, running, mode="affine").layers
    whole = CorrectionTrials(moe, ids, running, tokens_per_batch=64)
    if in_files:
        moe = dataclasses.replace(moe, results=SavedResults(tmp_path / "passes"))
    trials = CorrectionTrials(moe, ids, running, tokens_per_batch=64)
    assert torch.equal(trials.losses(fitted, keep=True), whole.losses(fitted))
    starts: list[int] = []
    run = DecoderStack.run

    def spy(self: DecoderStack, *args: Any, start: int, **kwargs: Any) -> torch.Tensor:
        starts.append(start)
        return run(self, *args, start=start, **kwargs)

    for index, layer in enumerate(moe.layers):
        tried = [*fitted[:index], None, *fitted[index + 1 :]]
        with monkeypatch.context() as patch:
            patch.setattr(DecoderStack, "run", spy)
            losses = trials.losses(tried, start=index)
        assert torch.equal(losses, whole.losses(tried))
        assert set(starts) == {layer.decoder_layer if index else 0}
        starts.clear()
