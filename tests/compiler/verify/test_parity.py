"""Artifacts that don't compute what their plan says are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from alloc_moe.compiler.errors import VerificationError
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.verify import parity as verify
from alloc_moe.compiler.verify.parity import check_verifiable, verify_artifact
from alloc_moe.passes.base import lazy_tensor
from alloc_moe.passes.interface.stamp_plan import StampPlanPass
from alloc_moe.runtime.artifact.plan import PLAN_KEY, AllocationPlan

PLANNED = [2, 3, 1]


@pytest.fixture(scope="module")
def moe(moe_model: Callable[[str], MoeModel]) -> MoeModel:
    return moe_model("olmoe")


@pytest.fixture(scope="module")
def plan(moe: MoeModel, plan_for: Callable[..., AllocationPlan]) -> AllocationPlan:
    return plan_for(moe, PLANNED)


@pytest.fixture
def specialized(exported: Callable[[str], ir.Model], plan: AllocationPlan) -> ir.Model:
    return specialize(exported("olmoe"), plan, device="cpu")


def change(model: ir.Model, name: str, edit: Callable[[NDArray[np.float32]], None]) -> None:
    """Change one weight of a graph whose weights other tests share."""
    value = model.graph.initializers[name]
    tensor = value.const_value
    assert tensor is not None
    array = tensor.numpy().copy()
    edit(array)
    value.const_value = lazy_tensor(lambda: array, array.shape, tensor.dtype, name)


def test_a_true_artifact_passes(
    specialized: ir.Model,
    moe: MoeModel,
    plan: AllocationPlan,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
) -> None:
    package.save_graph(specialized, tmp_path / "out.onnx")
    result = verify_artifact(tmp_path / "out.onnx", moe, plan, token_ids, dtype="float32")
    assert result.to_plan() == {
        "max_abs_logit_error": result.max_abs_logit_error,
        "kl": result.kl,
        "tokens": 54,
    }


def test_one_wrong_weight_is_refused(
    specialized: ir.Model,
    moe: MoeModel,
    plan: AllocationPlan,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
) -> None:
    def edit(array: NDArray[np.float32]) -> None:
        array[3] += 0.05

    change(specialized, "model.layers.1.input_layernorm.weight", edit)
    package.save_graph(specialized, tmp_path / "out.onnx")
    with pytest.raises(
        VerificationError, match=r"differ from PyTorch's by up to \d\.\d\de-0\d \(allowed: 0\.001\)"
    ):
        verify_artifact(tmp_path / "out.onnx", moe, plan, token_ids, dtype="float32")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("ks", [[2, 2, 1], [2, 3, 2]], ids=["fewer", "more"])
def test_another_number_of_experts_is_refused_in_every_precision(
    exported: Callable[[str], ir.Model],
    moe: MoeModel,
    plan: AllocationPlan,
    plan_for: Callable[..., AllocationPlan],
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    ks: list[int],
    device: str,
) -> None:
    wrong = specialize(exported("olmoe"), plan_for(moe, ks), device=device)
    StampPlanPass(PLAN_KEY, plan.to_json())(wrong)
    package.save_graph(wrong, tmp_path / "out.onnx")
    pads = 27 if device == "cpu" else 0  # of the prompts, one expert each
    executed = [54 * k + pads for k in ks]
    planned = [54 * k for k in PLANNED]
    with pytest.raises(VerificationError) as refused:
        verify_artifact(tmp_path / "out.onnx", moe, plan, token_ids, dtype="float16")
    assert f"executed {executed} experts per layer where the plan says {planned}" in str(
        refused.value
    )
    with pytest.raises(VerificationError, match="differ from PyTorch"):
        verify_artifact(tmp_path / "out.onnx", moe, plan, token_ids, dtype="float32")


@pytest.mark.parametrize(
    ("dtype", "message"), [("float32", "by up to nan"), ("float16", "no numbers in float16")]
)
def test_logits_that_are_no_numbers_are_refused(
    specialized: ir.Model,
    moe: MoeModel,
    plan: AllocationPlan,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    dtype: str,
    message: str,
) -> None:
    def edit(array: NDArray[np.float32]) -> None:
        array[...] = np.nan

    change(specialized, "model.norm.weight", edit)
    package.save_graph(specialized, tmp_path / "out.onnx")
    with pytest.raises(VerificationError, match=message):
        verify_artifact(tmp_path / "out.onnx", moe, plan, token_ids, dtype=dtype)


def test_a_wrong_16_bit_artifact_is_refused(
    specialized: ir.Model,
    moe: MoeModel,
    plan: AllocationPlan,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
) -> None:
    def edit(array: NDArray[np.float32]) -> None:
        array *= -1

    change(specialized, "model.norm.weight", edit)
    package.save_graph(specialized, tmp_path / "out.onnx")
    with pytest.raises(VerificationError, match="nats per token, more than float16 explains"):
        verify_artifact(tmp_path / "out.onnx", moe, plan, token_ids, dtype="float16")


def test_short_texts_are_repeated(
    specialized: ir.Model,
    moe: MoeModel,
    plan: AllocationPlan,
    tmp_path: Path,
) -> None:
    package.save_graph(specialized, tmp_path / "out.onnx")
    few = np.arange(5)[None]
    assert verify_artifact(tmp_path / "out.onnx", moe, plan, few, dtype="float32").tokens == 54


def test_bfloat16_is_refused_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "cuda_obstacle", lambda: "no NVIDIA driver was found")
    with pytest.raises(
        VerificationError,
        match="A bfloat16 artifact runs on CUDA only and is verified there, but no NVIDIA driver "
        r"was found\. Use --dtype float16",
    ):
        check_verifiable("bfloat16")
    check_verifiable("float16")
    check_verifiable("float32")


def test_bfloat16_is_taken_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "cuda_obstacle", lambda: None)
    check_verifiable("bfloat16")
