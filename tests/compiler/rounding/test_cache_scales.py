"""int8 caches: scales from a text, the same rounding in PyTorch, and artifacts that have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from alloc_moe.compiler.errors import UnsupportedModelError, VerificationError
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.rounding.cache_scales import RoundedCache, measure_cache_scales
from alloc_moe.compiler.verify.parity import MAX_ROUNDED_LOGIT_ERROR, verify_artifact
from alloc_moe.passes.attention.quantize_cache import CacheScales
from alloc_moe.runtime.artifact.plan import SHARED_CACHE_KEY, AllocationPlan
from alloc_moe.runtime.execution.buffers import INT8
from alloc_moe.runtime.execution.session import open_session

Models = Callable[[str], MoeModel]


@pytest.fixture(scope="module")
def moe(moe_model: Models) -> MoeModel:
    return moe_model("qwen3_moe")


@pytest.fixture(scope="module")
def scales(moe: MoeModel, token_ids: NDArray[np.int64]) -> CacheScales:
    return measure_cache_scales(moe, token_ids)


@pytest.fixture(scope="module")
def plan(moe: MoeModel, plan_for: Callable[..., AllocationPlan]) -> AllocationPlan:
    return plan_for(moe, [2, 1, 3])


@pytest.fixture
def artifact(
    exported: Callable[[str], ir.Model], plan: AllocationPlan, scales: CacheScales, tmp_path: Path
) -> Path:
    graph = specialize(exported("qwen3_moe"), plan, device="cpu", cache_scales=scales)
    package.save_graph(graph, tmp_path / "out.onnx")
    return tmp_path / "out.onnx"


def states(moe: MoeModel, ids: NDArray[np.int64], first_position: int = 0) -> list[torch.Tensor]:
    """Return the keys and values of every layer in turn [batch, heads, tokens, size]."""
    positions = torch.arange(first_position, first_position + ids.shape[1])[None]
    with torch.inference_mode():
        given = torch.from_numpy(ids)
        cache = moe.model(input_ids=given, position_ids=positions, use_cache=True).past_key_values
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def test_nothing_of_the_text_is_clipped_at_any_position(
    moe: MoeModel, scales: CacheScales, token_ids: NDArray[np.int64]
) -> None:
    steps = [scale for slot in range(3) for scale in scales[slot]]
    assert {scale.shape for scale in steps} == {(2, 16)}
    for first_position in (0, 3, 1000):
        found = states(moe, token_ids[:2], first_position)
        for tensor, scale in zip(found, steps, strict=True):
            assert (tensor.abs().amax((0, 2)).numpy() <= 127 * scale).all()


def test_scales_are_not_wider_than_they_must_be(
    moe: MoeModel, scales: CacheScales, token_ids: NDArray[np.int64]
) -> None:
    values = torch.stack([tensor.abs().amax((0, 2)) for tensor in states(moe, token_ids)[1::2]])
    steps = np.stack([scales[slot][1] for slot in range(3)])
    np.testing.assert_allclose(steps * 127, 1.25 * values.numpy(), rtol=1e-3)


def test_pytorch_rounds_what_it_keeps(moe: MoeModel, scales: CacheScales) -> None:
    cache = RoundedCache(scales)
    keys, values = torch.full((1, 2, 1, 16), 0.031), torch.full((1, 2, 1, 16), 1e6)
    found = cache.update(keys, values, 1)
    key_scale, value_scale = (torch.from_numpy(scale)[None, :, None] for scale in scales[1])
    torch.testing.assert_close(found[0], (0.031 / key_scale).round() * key_scale)
    torch.testing.assert_close(found[1], 127 * value_scale)  # clipped
    assert cache.get_seq_length(1) == 1


def test_an_artifact_computes_what_pytorch_does_with_the_same_rounding(
    artifact: Path,
    moe: MoeModel,
    plan: AllocationPlan,
    scales: CacheScales,
    token_ids: NDArray[np.int64],
) -> None:
    session = open_session(artifact, ep="cpu")
    assert {slot.element_type for slot in session.slots} == {INT8}
    assert session.files.onnx.metadata[SHARED_CACHE_KEY] == "int8"
    given = {"dtype": "float32", "cache_scales": scales}
    result = verify_artifact(artifact, moe, plan, token_ids, **given)  # type: ignore[arg-type]
    assert result.max_abs_logit_error < MAX_ROUNDED_LOGIT_ERROR / 5
    assert result.kl < 1e-7


def test_wrong_scales_are_refused(
    artifact: Path,
    moe: MoeModel,
    plan: AllocationPlan,
    scales: CacheScales,
    token_ids: NDArray[np.int64],
) -> None:
    other = {slot: (keys, values * 4) for slot, (keys, values) in scales.items()}
    with pytest.raises(VerificationError, match=r"\(allowed: 0\.05\)"):
        verify_artifact(artifact, moe, plan, token_ids, dtype="float32", cache_scales=other)


@pytest.mark.parametrize(("family", "device"), [("deepseek_v2", "cpu"), ("mixtral", "cuda")])
def test_a_cache_that_cannot_be_int8_is_refused(
    exported: Callable[[str], ir.Model],
    moe_model: Models,
    plan_for: Callable[..., AllocationPlan],
    scales: CacheScales,
    family: str,
    device: str,
) -> None:
    plan = plan_for(moe_model(family), [1, 1])
    with pytest.raises(UnsupportedModelError, match=r"An int8 cache needs .* --cache float32"):
        specialize(exported(family), plan, device=device, cache_scales=scales)
