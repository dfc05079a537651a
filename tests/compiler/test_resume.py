"""Profiles and compiles of models larger than memory go on where they were stopped."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.model.checkpoint import CheckpointReader
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import Compiled, Metric
from alloc_moe.compiler.rounding import weights as quantization
from alloc_moe.compiler.rounding.formats import choose_formats
from alloc_moe.compiler.rounding.weights import quantized
from alloc_moe.compiler.sensitivity import job
from alloc_moe.compiler.sensitivity import measuring as sensitivity
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.compiler.workspace.results import SavedResults
from alloc_moe.compiler.workspace.states import LayerStates
from alloc_moe.passes.blockwise import BlockFormat
from alloc_moe.runtime.artifact.plan import AllocationPlan

CALIBRATION = CalibrationSet(
    ids=np.random.default_rng(0).integers(0, 256, (5, 24)),
    sha256="0123456789abcdef",
    seed=3,
    tokens=120,
    sequence_length=24,
    name="random",
)


class _StopError(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def offloaded(checkpoint: Callable[[str], Path]) -> MoeModel:
    return load_model(str(checkpoint("deepseek_v2")), offload="always")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_TOKENS_PER_BATCH", 2 * 24)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by each decoder layer that is read."""
    reads = []
    read = CheckpointReader.read

    def watched(self: CheckpointReader, name: str, dtype: torch.dtype) -> torch.Tensor:
        if name.endswith(".input_layernorm.weight"):
            reads.append(name.split(".")[2])
        return read(self, name, dtype)

    monkeypatch.setattr(CheckpointReader, "read", watched)
    return reads


def stopping(owner: object, name: str, after: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a method raise after so many calls; return a list that grows by each call."""
    calls: list[int] = []
    method = getattr(owner, name)

    @functools.wraps(method)
    def counted(*args: object) -> object:
        if len(calls) == after:
            raise _StopError
        calls.append(1)
        return method(*args)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize(
    ("metric", "commits", "read_again"),
    [
        ("output", 1, ["1", "2"]),
        ("output", 3, []),
        ("fisher", 0, ["0", "1", "2", "2", "1"]),
        ("fisher", 2, ["2", "2", "1"]),
        ("fisher", 3, ["2", "1"]),
        ("fisher", 5, ["1"]),
    ],
)
def test_a_stopped_profile_goes_on_after_the_last_finished_layer(
    offloaded: MoeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reads: list[str],
    metric: Metric,
    commits: int,
    read_again: list[str],
) -> None:
    measure = functools.partial(measure_sensitivity, offloaded, CALIBRATION, metric=metric)
    whole = measure()
    path = tmp_path / "profile.json"
    with monkeypatch.context() as patch:
        stopping(LayerStates, "commit", commits, patch)
        if metric == "output" and commits == 3:
            stopping(sensitivity.OutputRun, "loss", 1, patch)
        with pytest.raises(_StopError):
            measure(path=path)
    reads.clear()
    resumed = measure(path=path)
    assert reads == read_again
    assert dataclasses.replace(resumed, seconds=0) == dataclasses.replace(whole, seconds=0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["profile.json"]


def test_states_of_another_profile_are_not_used(
    offloaded: MoeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    path = tmp_path / "profile.json"
    with monkeypatch.context() as patch:
        stopping(LayerStates, "commit", 2, patch)
        with pytest.raises(_StopError):
            measure_sensitivity(offloaded, CALIBRATION, metric="output", path=path)
    path.unlink()
    other = dataclasses.replace(CALIBRATION, seed=4)
    reads.clear()
    measure_sensitivity(offloaded, other, metric="output", path=path)
    assert reads == ["0", "1", "2"]


def test_damaged_states_are_measured_again(
    offloaded: MoeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    path = tmp_path / "profile.json"
    with monkeypatch.context() as patch:
        stopping(LayerStates, "commit", 2, patch)
        with pytest.raises(_StopError):
            measure_sensitivity(offloaded, CALIBRATION, metric="output", path=path)
    [states] = (tmp_path / ".profile.json.states").glob("entering-2*")
    states.write_bytes(states.read_bytes()[:100])
    reads.clear()
    resumed = measure_sensitivity(offloaded, CALIBRATION, metric="output", path=path)
    assert reads == ["0", "1", "2"]
    whole = measure_sensitivity(offloaded, CALIBRATION, metric="output")
    assert dataclasses.replace(resumed, seconds=0) == dataclasses.replace(whole, seconds=0)


def test_a_stopped_compile_repeats_no_pass(
    compile_to: Callable[..., Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan_in(folder: str) -> AllocationPlan:
        (tmp_path / folder).mkdir(exist_ok=True)
        output = tmp_path / folder / "out.onnx"
        return compile_to(output, offload="always", force=True).plan

    with monkeypatch.context() as patch:
        kept = stopping(SavedResults, "keep", -1, patch)
        whole = plan_in("whole")
    assert len(kept) > 20
    done = 0
    while done < len(kept):
        with monkeypatch.context() as patch:
            calls = stopping(SavedResults, "keep", 7, patch)
            try:
                plan = plan_in("parts")
            except _StopError:
                assert (tmp_path / "parts" / ".out.onnx.passes").is_dir()
            done += len(calls)
    assert done == len(kept)
    assert dataclasses.replace(plan, verify={}) == dataclasses.replace(whole, verify={})
    files = {"out.onnx", "out.onnx.data", "out.onnx.profile.json"}
    assert {path.name for path in (tmp_path / "parts").iterdir()} == files


@pytest.mark.parametrize("metric", ["fisher", "output"])
def test_weights_of_an_offloaded_layer_are_rounded_once(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metric: Metric,
) -> None:
    moe = load_model(str(checkpoint("olmoe")), offload="always")
    moe = dataclasses.replace(moe, results=SavedResults(tmp_path / "passes"))
    formats = choose_formats(moe.checkpoint, "int4")
    rounded_moe = quantized(moe, formats)
    packed: list[object] = []
    pack = quantization.quantize

    def counted(weights: np.ndarray, form: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
        packed.append(weights.shape)
        return pack(weights, form)

    monkeypatch.setattr(quantization, "quantize", counted)
    first = measure_sensitivity(rounded_moe, CALIBRATION, metric=metric)
    layers = len(moe.layers)
    offloaded_weights = 6 * layers  # q, k, v, o and two tensors of experts
    assert len(packed) == offloaded_weights
    again = measure_sensitivity(rounded_moe, CALIBRATION, metric=metric)
    assert len(packed) == offloaded_weights
    resident = quantized(load_model(str(checkpoint("olmoe")), offload="never"), formats)
    expected = measure_sensitivity(resident, CALIBRATION, metric=metric)
    for found in (first, again):
        for row, wanted in zip(found.costs, expected.costs, strict=True):
            assert row == pytest.approx(wanted, rel=1e-6)


def test_what_a_kill_left_of_a_result_is_not_believed_and_goes_with_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = SavedResults(tmp_path / "passes")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: None)  # killed just before
        passes.keep(["a"], [torch.ones(2)])
    assert passes.find(["a"]) is None
    passes.keep(["a"], [torch.zeros(2)])
    (found,) = passes.find(["a"]) or ()
    assert torch.equal(found, torch.zeros(2))
    assert len(list((tmp_path / "passes").glob(".*.partial"))) == 1
    passes.delete()
    assert list(tmp_path.iterdir()) == []
