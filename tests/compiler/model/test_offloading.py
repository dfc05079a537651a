"""Models whose decoder layers are read when they run give what models in memory give."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.model import offloading as offload
from alloc_moe.compiler.model.checkpoint import CheckpointReader
from alloc_moe.compiler.model.layer_progress import forward_gflop
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.offloading import wants_offloading
from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.planning.allocation import parse_budget
from alloc_moe.compiler.planning.plan import make_planned
from alloc_moe.compiler.records import CorrectionMode, Metric, PlanOptions, Redistribution
from alloc_moe.compiler.rounding.cache_scales import measure_cache_scales
from alloc_moe.compiler.sensitivity import job
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.compiler.verify.expected import clear_references
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.console import Console

CALIBRATION = CalibrationSet(
    ids=np.random.default_rng(0).integers(0, 256, (5, 24)),
    sha256="0123456789abcdef",
    seed=3,
    tokens=120,
    sequence_length=24,
    name="random",
)

Models = Callable[[str], MoeModel]


@pytest.fixture(scope="module")
def offloaded(checkpoint: Callable[[str], Path]) -> Models:
    """Return a function from a family's name to its checkpoint, whose layers are read to run."""
    return functools.cache(lambda family: load_model(str(checkpoint(family)), offload="always"))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make 5 windows take 3 batches."""
    monkeypatch.setattr(job, "_TOKENS_PER_BATCH", 2 * 24)


@pytest.fixture
def layer_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the name of every expert weight that is read."""
    reads = []
    read = CheckpointReader.read

    def watched(self: CheckpointReader, name: str, dtype: torch.dtype) -> torch.Tensor:
        if name.endswith("experts.down_proj"):
            reads.append(name)
        return read(self, name, dtype)

    monkeypatch.setattr(CheckpointReader, "read", watched)
    return reads


def test_logits_are_the_same(
    moe_model: Models, offloaded: Models, any_family: str, token_ids: NDArray[np.int64]
) -> None:
    ids = torch.from_numpy(token_ids[:2])
    with torch.no_grad():
        expected, actual = (
            model(any_family).model(input_ids=ids).logits for model in (moe_model, offloaded)
        )
    assert torch.equal(actual, expected)


def test_only_what_is_outside_of_decoder_layers_stays_in_memory(offloaded: Models) -> None:
    model = offloaded("olmoe").model
    model(input_ids=torch.zeros(1, 3, dtype=torch.long))
    on_disk = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert on_disk == {n for n, _ in model.named_parameters() if n.startswith("model.layers.")}


def test_configurations_of_generation_are_the_same(moe_model: Models, offloaded: Models) -> None:
    expected, actual = (m("olmoe").model.generation_config for m in (moe_model, offloaded))
    assert actual.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("family", "metric"),
    [
        *(
            (family, metric)
            for family in ("olmoe", "deepseek_v2")
            for metric in ("fisher", "output")
        ),
        *(("qwen2_moe", metric) for metric in ("kl", "ppl-suffix", "data-free")),
    ],
)
def test_profiles_are_the_same(
    moe_model: Models, offloaded: Models, family: str, metric: Metric
) -> None:
    expected, actual = (
        measure_sensitivity(model(family), CALIBRATION, metric=metric)
        for model in (moe_model, offloaded)
    )
    assert dataclasses.replace(actual, seconds=0) == dataclasses.replace(expected, seconds=0)


@pytest.mark.parametrize("metric", ["fisher", "output", "kl"])
@pytest.mark.parametrize(
    ("redistribution", "correction"), [("threshold", "none"), ("sequence", "affine")]
)
def test_profiles_with_all_in_place_are_the_same(
    moe_model: Models,
    offloaded: Models,
    metric: Metric,
    redistribution: Redistribution,
    correction: CorrectionMode,
) -> None:
    expected, actual = (
        measure_sensitivity(
            model("qwen2_moe"),
            CALIBRATION,
            metric=metric,
            redistribution=redistribution,
            correction=correction,
        )
        for model in (moe_model, offloaded)
    )
    assert dataclasses.replace(actual, seconds=0) == dataclasses.replace(expected, seconds=0)


@pytest.mark.parametrize(
    ("family", "redistribution"),
    [("qwen2_moe", "price"), ("olmoe", "threshold"), ("deepseek_v2", "batch")],
)
def test_plans_and_corrections_are_the_same(
    moe_model: Models, offloaded: Models, family: str, redistribution: Redistribution
) -> None:
    made = []
    for moe in (moe_model(family), offloaded(family)):
        most = [layer.experts_per_token for layer in moe.layers]
        planned = make_planned(
            moe,
            CALIBRATION,
            parse_budget("0.6", most),
            PlanOptions(redistribution),
            profile=measure_sensitivity(
                moe, CALIBRATION, metric="fisher", redistribution=redistribution
            ),
            console=Console(quiet=True),
        )
        made.append(planned)
    expected, actual = made
    assert actual.plan == expected.plan
    for ours, theirs in zip(actual.corrections, expected.corrections, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            np.testing.assert_array_equal(ours.scale, theirs.scale)


@pytest.mark.parametrize("redistribution", ["batch", "sequence"])
def test_the_reference_of_verification_is_the_same(
    moe_model: Models,
    offloaded: Models,
    plan_for: Callable[..., AllocationPlan],
    token_ids: NDArray[np.int64],
    family: str,
    redistribution: str,
) -> None:
    references = []
    for moe in (moe_model(family), offloaded(family)):
        ks = [2] * len(moe.layers)
        plan = plan_for(moe, ks, redistribution=redistribution)
        references += clear_references(moe, plan, token_ids, [None], None)
    expected, actual = references
    np.testing.assert_allclose(actual.logits, expected.logits, atol=2e-6, rtol=1e-6)
    assert actual.executed == expected.executed
    assert actual.margin == pytest.approx(expected.margin, rel=1e-6)
    np.testing.assert_array_equal(actual.batch.prompts, expected.batch.prompts)


def test_verification_reads_each_layer_once(
    offloaded: Models,
    score_plan: Callable[..., AllocationPlan],
    token_ids: NDArray[np.int64],
    layer_reads: list[str],
) -> None:
    moe = offloaded("olmoe")
    plan = score_plan(moe, "price")
    layer_reads.clear()
    assert len(clear_references(moe, plan, token_ids, [None, 0.5], None)) == 2
    assert len(layer_reads) == len(moe.layers)


def test_scales_of_a_cache_are_the_same_and_read_each_layer_once(
    moe_model: Models, offloaded: Models, token_ids: NDArray[np.int64], layer_reads: list[str]
) -> None:
    expected = measure_cache_scales(moe_model("qwen3_moe"), token_ids)
    moe = offloaded("qwen3_moe")
    layer_reads.clear()
    actual = measure_cache_scales(moe, token_ids)
    assert len(layer_reads) == len(moe.layers)
    assert actual.keys() == expected.keys()
    for slot, pair in expected.items():
        np.testing.assert_array_equal(actual[slot], pair)


@pytest.mark.parametrize(("metric", "reads"), [("output", 1), ("fisher", 2), ("data-free", 1)])
def test_a_profile_in_one_pass_reads_each_layer_so_often(
    offloaded: Models, layer_reads: list[str], metric: Metric, reads: int
) -> None:
    moe = offloaded("deepseek_v2")
    measure_sensitivity(moe, CALIBRATION, metric=metric)
    assert len(layer_reads) == reads * len(moe.layers)


def test_all_inputs_pass_a_layer_before_the_next_is_read(
    moe_model: Models, offloaded: Models, layer_reads: list[str]
) -> None:
    ids = torch.from_numpy(CALIBRATION.ids)
    ends = []
    for moe in (moe_model("mixtral"), offloaded("mixtral")):
        stack = DecoderStack(moe.model, moe.layers[0])
        with torch.no_grad():
            ends.append(list(stack.stream((row[None], None) for row in ids)))
    for expected, actual in zip(*ends, strict=True):
        assert torch.equal(actual, expected)
    assert len(layer_reads) == 2


def test_every_weight_of_a_layer_can_be_changed_as_it_is_read(
    checkpoint: Callable[[str], Path],
) -> None:
    moe = load_model(str(checkpoint("olmoe")), offload="always")
    ids = torch.zeros(1, 3, dtype=torch.long)
    stack = DecoderStack(moe.model, moe.layers[0])
    assert moe.offloading is not None
    names = []

    def negate(name: str, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        names.append(name)
        return -read() if name.endswith("experts.down_proj") else read()

    with torch.no_grad():
        before = stack.run(ids, None, start=0, stop=3)
        moe.offloading.source.transform = negate
        after = stack.run(ids, None, start=0, stop=3)
    expected = [n for n, p in moe.model.named_parameters() if p.is_meta]
    assert sorted(names) == sorted(expected)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize(("free", "expected"), [(2.01, False), (1.99, True)])
def test_a_model_is_offloaded_if_it_and_an_artifact_may_not_fit(
    moe_model: Models, monkeypatch: pytest.MonkeyPatch, free: float, expected: bool
) -> None:
    skeleton = moe_model("olmoe").checkpoint.skeleton
    size = 4 * sum(parameter.numel() for parameter in skeleton.parameters())
    monkeypatch.setattr(offload, "available_memory", lambda: int(free * size))
    assert wants_offloading(skeleton, "auto") is expected
    assert wants_offloading(skeleton, "always")
    assert not wants_offloading(skeleton, "never")


def test_what_was_chosen_is_said_with_its_reason(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "available_memory", lambda: 300_000)
    moe = load_model(str(checkpoint("olmoe")))
    assert moe.offloading is not None
    said = dataclasses.replace(
        moe.offloading, weights_bytes=28 << 30, free_bytes=18 << 30, seconds=31.4
    )
    assert said.describe() == (
        "28.0 GiB of float32 weights and an artifact as large may not fit in the 18.0 GiB of "
        "memory that are free: decoder layers are read from disk when they run, in about 31 s "
        "each time all of them run. --offload never keeps them in memory"
    )
    assert dataclasses.replace(said, forced=True).describe() == (
        "As asked, decoder layers are read from disk when they run (28.0 GiB of float32 weights), "
        "in about 31 s each time all of them run"
    )


@pytest.mark.parametrize(
    ("metric", "reads"), [("fisher", "2"), ("output", "1"), ("kl", "3"), ("data-free", "1")]
)
def test_what_a_profile_will_take_is_said(
    offloaded: Models, capsys: pytest.CaptureFixture[str], metric: Metric, reads: str
) -> None:
    measure_sensitivity(offloaded("deepseek_v2"), CALIBRATION, metric=metric, console=Console())
    assert re.search(
        rf"Profiling by {metric} will take about [\d.]+ s \(reading all layers {reads} times: "
        r"[\d.]+ s, computing: [\d.]+ s at best\)",
        capsys.readouterr().err,
    )


def test_what_a_profile_computes_is_that_of_its_active_weights(offloaded: Models) -> None:
    # Of 3 layers with 8 experts 4 run, each 3 matrices of 32 by 64; all have 4 of 64 by 64, a
    # router of 8 by 64 and norms.
    layer = 4 * 3 * 32 * 64 + 4 * 64 * 64 + 8 * 64 + 4 * 64
    assert forward_gflop(offloaded("olmoe"), 1000) == pytest.approx(2e-9 * 3 * layer * 1000)
