"""Artifacts run segment by segment give what they give whole, bit for bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from alloc_moe.compiler.errors import VerificationError
from alloc_moe.compiler.export.normalize import export_model
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.rounding.cache_scales import measure_cache_scales
from alloc_moe.compiler.rounding.formats import choose_formats
from alloc_moe.compiler.rounding.weights import quantized
from alloc_moe.compiler.verify import artifact_run
from alloc_moe.compiler.verify import parity as verify
from alloc_moe.compiler.verify.artifact_run import ArtifactRun, run_by_segments, run_whole
from alloc_moe.compiler.verify.batch import BATCH_TOKENS, PromptBatch
from alloc_moe.compiler.verify.parity import Verification, verify_artifact
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.errors import ArtifactError

Models = Callable[[str], MoeModel]
Graphs = Callable[[str], ir.Model]
Plans = Callable[..., AllocationPlan]
Written = Callable[..., Path]

EXPERTS = 8 * 3 * 32 * 64 * 4  # bytes of a layer's in the small models


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return a list that grows by the content of every segment that is loaded."""
    loaded: list[bytes] = []
    create = artifact_run.create_session

    def watched(model: bytes, *args: Any, **kwargs: Any) -> Any:
        loaded.append(model)
        return create(model, *args, **kwargs)

    monkeypatch.setattr(artifact_run, "create_session", watched)
    return loaded


HYBRIDS = ("lfm2_moe", "granitemoehybrid_mamba", "jamba", "kimi_linear")


def runs(token_ids: NDArray[np.int64], prices: Sequence[float | None]) -> list[ArtifactRun]:
    starts = range(0, len(prices) * BATCH_TOKENS, BATCH_TOKENS)
    text = token_ids.reshape(-1)
    batches = [PromptBatch.of(text[start : start + BATCH_TOKENS]) for start in starts]
    return [ArtifactRun(b.steps(), price) for b, price in zip(batches, prices, strict=True)]


def assert_same(
    path: Path, token_ids: NDArray[np.int64], prices: Sequence[float | None], limit: int
) -> None:
    expected, actual = runs(token_ids, prices), runs(token_ids, prices)
    run_whole(path, expected, ep="cpu")
    run_by_segments(path, actual, limit=limit)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.executed == theirs.executed
        for logits, wanted in zip(ours.logits, theirs.logits, strict=True):
            assert logits.dtype == wanted.dtype
            np.testing.assert_array_equal(logits, wanted)


@pytest.mark.parametrize("limit", [1, EXPERTS, 3 * EXPERTS, 1 << 30])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v2"])
def test_logits_and_counts_are_those_of_the_whole_artifact(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    written: Written,
    sessions: list[bytes],
    family: str,
    limit: int,
) -> None:
    plan = score_plan(moe_model(family), "price")
    path = written(exported(family), plan)
    assert plan.price is not None
    assert_same(path, token_ids, [None, 2 * plan.price], limit)
    layers = moe_model(family).config.num_hidden_layers
    if limit > EXPERTS:
        assert len(sessions) == (1 if limit == 1 << 30 else (layers + 1) // 2)
    else:
        assert len(sessions) > layers
    assert {file.name for file in tmp_path.iterdir()} == {"out.onnx", "out.onnx.data"}


def test_no_segment_is_loaded_before_the_last_one_is_freed(
    moe_model: Models,
    exported: Graphs,
    plan_for: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_for(moe_model("olmoe"), [2, 3, 1])
    path = written(exported("olmoe"), plan)
    loaded: list[weakref.ref[Any]] = []
    create = artifact_run.create_session

    def watched(model: bytes, *args: Any, **kwargs: Any) -> Any:
        assert not any(earlier() for earlier in loaded)
        graph = ir.from_proto(onnx.load_model_from_string(model)).graph
        weights = [value.const_value for value in graph.initializers.values()]
        large = [tensor.nbytes for tensor in weights if isinstance(tensor, ir.ExternalTensor)]
        assert sum(large) <= EXPERTS  # those of one operator
        session = create(model, *args, **kwargs)
        loaded.append(weakref.ref(session))
        return session

    monkeypatch.setattr(artifact_run, "create_session", watched)
    run_by_segments(path, runs(token_ids, [None]), limit=1)
    assert len(loaded) > len(plan.layers)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tokens_that_compete_do_so_in_segments_as_well(
    moe_model: Models,
    exported: Graphs,
    plan_for: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
    device: str,
) -> None:
    plan = plan_for(moe_model("olmoe"), [2, 3, 1])
    path = written(exported("olmoe"), plan, device=device)
    assert_same(path, token_ids, [None], EXPERTS)


def test_half_precision_is_rounded_at_cuts_and_no_further(
    moe_model: Models,
    half_graph: ir.Model,
    plan_for: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
) -> None:
    plan = plan_for(moe_model("olmoe"), [2, 3, 1])
    path = written(half_graph, plan, device="cuda")
    expected, actual = runs(token_ids, [None]), runs(token_ids, [None])
    run_whole(path, expected, ep="cpu")
    run_by_segments(path, actual, limit=1)
    assert actual[0].executed == expected[0].executed
    for logits, wanted in zip(actual[0].logits, expected[0].logits, strict=True):
        assert logits.dtype == wanted.dtype == np.float16
        np.testing.assert_allclose(logits, wanted, atol=0.01)


def test_an_int8_cache_stays_within_its_segment(
    moe_model: Models,
    exported: Graphs,
    plan_for: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
) -> None:
    moe = moe_model("qwen3_moe")
    plan, scales = plan_for(moe, [2, 1, 3]), measure_cache_scales(moe, token_ids)
    path = written(exported("qwen3_moe"), plan, cache_scales=scales)
    assert_same(path, token_ids, [None], 1)


def test_an_artifact_without_its_data_is_refused(
    moe_model: Models,
    exported: Graphs,
    plan_for: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
) -> None:
    plan = plan_for(moe_model("olmoe"), [2, 3, 1])
    path = written(exported("olmoe"), plan)
    path.with_name("out.onnx.data").unlink()
    with pytest.raises(ArtifactError, match="which is missing"):
        run_by_segments(path, runs(token_ids, [None]), limit=1)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(("olmoe", "float32"), ("olmoe", "int8"), ("deepseek_v2", "int4"), ("qwen3_next", "int4")),
        *(pytest.param(family, "int8", marks=pytest.mark.families) for family in HYBRIDS),
    ],
)
def test_an_offloaded_model_is_verified_by_segments_with_the_same_figures(
    checkpoint: Callable[[str], Path],
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sessions: list[bytes],
    family: str,
    dtype: str,
) -> None:
    monkeypatch.setattr(verify, "SEGMENT_BYTES", EXPERTS // 8)
    found: list[Verification] = []
    for offload in ("never", "always"):
        moe = load_model(str(checkpoint(family)), offload=offload)  # type: ignore[arg-type]
        if dtype != "float32":
            moe = quantized(moe, choose_formats(moe.checkpoint, dtype))
        if offload == "never":
            plan = score_plan(moe, "price")
            graph = export_model(moe, dtype="float32")
            graph = specialize(graph, plan, device="cpu", quantization=moe.quantization)
            package.save_graph(graph, tmp_path / "out.onnx")
        found.append(verify_artifact(tmp_path / "out.onnx", moe, plan, token_ids, dtype=dtype))
        assert bool(sessions) is (offload == "always")
    assert found[1].tokens == found[0].tokens == 108
    assert found[1].max_abs_logit_error == pytest.approx(found[0].max_abs_logit_error, abs=5e-6)
    assert found[1].kl == pytest.approx(found[0].kl, rel=1e-3, abs=1e-9)


def test_a_wrong_artifact_of_an_offloaded_model_is_refused(
    checkpoint: Callable[[str], Path],
    exported: Graphs,
    plan_for: Plans,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
) -> None:
    moe = load_model(str(checkpoint("olmoe")), offload="always")
    wrong = specialize(exported("olmoe"), plan_for(moe, [2, 2, 1]), device="cpu")
    package.save_graph(wrong, tmp_path / "out.onnx")
    with pytest.raises(VerificationError, match="differ from PyTorch"):
        verify_artifact(
            tmp_path / "out.onnx", moe, plan_for(moe, [2, 3, 1]), token_ids, dtype="float32"
        )
