"""Graphs for CUDA pad right; whatever callers do, they say what graphs for the CPU say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.execution.session import ArtifactSession, open_session

BATCH = 3


@pytest.fixture
def sessions(
    exported: Callable[[str], ir.Model],
    moe_model: Callable[[str], MoeModel],
    plan_for: Callable[..., AllocationPlan],
    written: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> dict[str, ArtifactSession]:
    plan = plan_for(moe_model("olmoe"), [2, 3, 1], redistribution=request.param)
    opened = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        folder.mkdir()
        path = written(exported("olmoe"), plan, folder, device=device)
        opened[device] = open_session(path, ep="cpu", count_activations=True)
    return opened


@pytest.mark.parametrize("sessions", ["batch", "sequence", "none"], indirect=True)
@pytest.mark.parametrize("seed", range(3))
def test_any_padding_gives_the_same_logits_and_counts(
    sessions: dict[str, ArtifactSession], seed: int
) -> None:
    random = np.random.default_rng(seed)
    together = sessions["cuda"].plan.redistribution == "batch"  # rows can't be run apart
    caches = {device: session.empty_cache(BATCH) for device, session in sessions.items()}
    mask = np.zeros((BATCH, 0), np.int64)
    for call, length in enumerate((23, 1, 1, 1 if together else 4, 1, 1)):
        # Rows have gaps, and pause while others go on.
        new = (random.random((BATCH, length)) < 0.7).astype(np.int64)
        ids = random.integers(0, 256, (BATCH, length))
        mask = np.concatenate([mask, new], axis=1)
        keep = 1 if call % 2 else None
        found = {
            device: session.run(ids, attention_mask=mask, cache=caches[device], logits_to_keep=keep)
            for device, session in sessions.items()
        }
        real = new[:, -1:] > 0 if keep else new > 0
        cpu, cuda = (found[device] for device in ("cpu", "cuda"))
        np.testing.assert_allclose(cuda.logits[real], cpu.logits[real], atol=1e-4)
        pads = int((new == 0).sum())  # of which each runs one expert on the CPU
        assert [count - pads for count in cpu.activations or ()] == list(cuda.activations or ())
        if call == 2:
            caches = {device: cache.fork() for device, cache in caches.items()}
        if call == 4:
            mask = mask[:, :-1]
            for cache in caches.values():
                cache.truncate(mask.shape[1])


@pytest.mark.parametrize("sessions", ["none"], indirect=True)
def test_a_mask_of_another_form_gives_nan(sessions: dict[str, ArtifactSession]) -> None:
    path = str(sessions["cuda"].files.graph)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    mask = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]])
    inputs = {"input_ids": np.ones_like(mask), "attention_mask": mask}
    for value in session.get_inputs():
        if value.name not in inputs:
            assert len(value.shape) == 4, value.name
            heads, size = value.shape[1], value.shape[3]
            inputs[value.name] = np.zeros((len(mask), heads, 0, size), np.float32)
    (logits,) = session.run(["logits"], inputs)
    assert np.isnan(logits).all(axis=(1, 2)).tolist() == [False, True, True, False]
    assert not np.isnan(logits[[0, 3]]).any()
