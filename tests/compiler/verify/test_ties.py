"""Choices of experts that are ties are no faults, and hide none."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from alloc_moe.compiler.errors import VerificationError
from alloc_moe.compiler.export.normalize import export_model
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.records import Verification
from alloc_moe.compiler.reference.experts import allocated
from alloc_moe.compiler.reference.policies import LayerParameters, layer_parameters
from alloc_moe.compiler.reference.scores import scores
from alloc_moe.compiler.verify import expected
from alloc_moe.compiler.verify import parity as verify
from alloc_moe.compiler.verify.batch import BATCH_TOKENS, PromptBatch
from alloc_moe.compiler.verify.parity import verify_artifact
from alloc_moe.passes.base import lazy_tensor
from alloc_moe.passes.interface.stamp_plan import StampPlanPass
from alloc_moe.runtime.artifact.plan import PLAN_KEY, AllocationPlan

Plans = Callable[..., AllocationPlan]
Graphs = Callable[[str], ir.Model]

FAULT = r"differ from PyTorch's .* This is a fault of the compiler"
NEAR = 2e-6  # of a price: more than rounding, less than a tie


@pytest.fixture(scope="module")
def moe(moe_model: Callable[[str], MoeModel]) -> MoeModel:
    return moe_model("olmoe")


@pytest.fixture(scope="module")
def text(token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a text that is just long enough, so that every try is the same."""
    return token_ids.reshape(1, -1)[:, :BATCH_TOKENS]


@pytest.fixture(scope="module")
def plan(moe: MoeModel, score_plan: Plans, text: NDArray[np.int64]) -> AllocationPlan:
    """Return a plan whose price is a score of the text, but for what is less than a tie."""
    planned = score_plan(moe, "price")
    found: list[torch.Tensor] = []

    def watch(layer: int, weights: torch.Tensor, ids: torch.Tensor, given: LayerParameters) -> None:
        if layer == 0:
            found.append(scores("price", weights, ids, given.sizes))

    parameters = layer_parameters(planned)
    with (
        torch.inference_mode(),
        allocated(
            moe.model,
            moe.layers,
            parameters,
            redistribution="price",
            weights="keep",
            watch=watch,
        ),
    ):
        ids, mask, positions = PromptBatch.of(text[0]).inputs()[0]
        moe.model(input_ids=ids, attention_mask=mask, position_ids=positions)
    second = found[0][: ids.shape[1], 1]  # of the first row's tokens, which has no padding
    return dataclasses.replace(planned, price=float(second.median()) * (1 + NEAR), dial=None)


def written(
    graph: ir.Model,
    made: AllocationPlan,
    told: AllocationPlan,
    path: Path,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Path:
    """Write the artifact of one plan, which says that it is of another."""
    model = specialize(graph, made, device=device)
    StampPlanPass(PLAN_KEY, told.to_json())(model)
    package.save_graph(model, path)
    return path


@pytest.fixture
def verified(
    moe: MoeModel,
    exported: Graphs,
    plan: AllocationPlan,
    text: NDArray[np.int64],
    tmp_path: Path,
) -> Callable[..., Verification]:
    """Return a function that verifies the artifact of another plan as the plan's."""

    def verify_made(
        made: AllocationPlan,
        *,
        reference: MoeModel = moe,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> Verification:
        path = written(exported("olmoe"), made, plan, tmp_path / "out.onnx", device=device)
        return verify_artifact(path, reference, plan, text, dtype="float32")

    return verify_made


def cheaper(plan: AllocationPlan, share: float) -> AllocationPlan:
    assert plan.price is not None
    return dataclasses.replace(plan, price=plan.price * (1 - share))


def test_a_tie_that_the_artifact_takes_otherwise_is_no_fault(
    plan: AllocationPlan,
    verified: Callable[..., Verification],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    near = cheaper(plan, 2 * NEAR)
    assert verified(near).max_abs_logit_error < 1e-5
    monkeypatch.setattr(verify, "NEAR_TIE", 0.0)
    with pytest.raises(VerificationError, match=FAULT):
        verified(near)


def test_ties_are_taken_alike_layer_by_layer(
    checkpoint: Callable[[str], Path],
    plan: AllocationPlan,
    verified: Callable[..., Verification],
) -> None:
    offloaded = load_model(str(checkpoint("olmoe")), offload="always")
    result = verified(cheaper(plan, 2 * NEAR), reference=offloaded)
    assert result.max_abs_logit_error < 1e-5


def test_beside_a_tie_another_price_is_refused(
    plan: AllocationPlan, verified: Callable[..., Verification]
) -> None:
    with pytest.raises(VerificationError, match=FAULT):
        verified(cheaper(plan, 0.05))


def test_beside_a_tie_another_size_of_an_expert_is_refused(
    plan: AllocationPlan, verified: Callable[..., Verification]
) -> None:
    near = cheaper(plan, 2 * NEAR)
    first, *others = near.layers
    assert first.sizes is not None
    sizes = (*first.sizes[:-1], 0.5 * first.sizes[-1])
    wrong = dataclasses.replace(near, layers=(dataclasses.replace(first, sizes=sizes), *others))
    with pytest.raises(VerificationError, match=FAULT):
        verified(wrong)


def test_beside_a_tie_a_wrong_weight_of_an_expert_is_refused(
    moe: MoeModel,
    exported: Graphs,
    plan: AllocationPlan,
    text: NDArray[np.int64],
    tmp_path: Path,
) -> None:
    model = specialize(exported("olmoe"), cheaper(plan, 2 * NEAR), device="cpu")
    StampPlanPass(PLAN_KEY, plan.to_json())(model)
    value = model.graph.initializers["model.layers.1.mlp.experts.down_proj"]
    tensor = value.const_value
    assert tensor is not None
    array = tensor.numpy().copy()
    array[2] *= 1.2
    value.const_value = lazy_tensor(lambda: array, array.shape, tensor.dtype, value.name)
    package.save_graph(model, tmp_path / "out.onnx")
    with pytest.raises(VerificationError, match=FAULT):
        verify_artifact(tmp_path / "out.onnx", moe, plan, text, dtype="float32")


def test_a_tie_where_it_is_unknown_which_experts_run_is_told(
    plan: AllocationPlan, verified: Callable[..., Verification]
) -> None:
    with pytest.raises(
        VerificationError,
        match=r"In every text that was tried some choice of experts is a tie but for \d\.\de-0\d "
        r"of a router's weight, which may be all of it: give another --calibration text or --seed",
    ):
        verified(cheaper(plan, 2 * NEAR), device="cuda")


def with_twins(checkpoint: Path, folder: Path, *, more: float) -> str:
    """Copy a checkpoint, in one layer of which the last expert's weight is the first's and more."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    router = tensors["model.layers.1.mlp.gate.weight"]
    router[-1] = router[0] * (1 + more)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("offload", ["never", "always"])
def test_a_tie_for_a_routers_last_place_is_no_fault(
    checkpoint: Callable[[str], Path],
    plan_for: Plans,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    offload: Literal["never", "always"],
) -> None:
    made = load_model(with_twins(checkpoint("olmoe"), tmp_path / "made", more=NEAR))
    told = load_model(
        with_twins(checkpoint("olmoe"), tmp_path / "told", more=-NEAR), offload=offload
    )
    plan = plan_for(told, [layer.experts_per_token for layer in told.layers])
    path = written(export_model(made, dtype="float32"), plan, plan, tmp_path / "out.onnx")
    verify_plan = functools.partial(verify_artifact, path, told, plan, token_ids, dtype="float32")
    assert verify_plan().max_abs_logit_error < 1e-4
    monkeypatch.setattr(verify, "NEAR_TIE", 0.0)
    with pytest.raises(VerificationError, match=FAULT):
        verify_plan()


def test_a_token_for_which_an_artifact_runs_no_expert_is_not_taken_over(
    moe: MoeModel,
    plan: AllocationPlan,
    text: NDArray[np.int64],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first_alone = dataclasses.replace(plan, price=1e9)
    (reference,) = expected.clear_references(moe, first_alone, text, [None], None)
    batches = [ids.size for ids, _ in reference.batch.steps()]
    nothing = [np.zeros((tokens, moe.layers[0].num_experts), np.bool_) for tokens in batches]
    monkeypatch.setattr(expected, "NEAR_TIE", 1.0)  # so is the lead of each first candidate
    found = expected.with_same_ties(
        reference,
        [nothing] * len(moe.layers),
        moe=moe,
        plan=first_alone,
        price=None,
        corrections=None,
        cache_scales={},
    )
    assert found.executed == reference.executed
    np.testing.assert_array_equal(found.logits, reference.logits)


def test_where_all_weights_tie_the_number_of_experts_still_counts(
    moe: MoeModel, exported: Graphs, plan_for: Plans, tmp_path: Path
) -> None:
    same = np.full((1, BATCH_TOKENS), 7)
    plan = plan_for(moe, [2, 3, 2], redistribution="batch")
    path = written(exported("olmoe"), plan, plan, tmp_path / "out.onnx")
    assert verify_artifact(path, moe, plan, same, dtype="float32").max_abs_logit_error < 1e-5
    more = plan_for(moe, [3, 3, 2], redistribution="batch")
    path = written(exported("olmoe"), more, plan, tmp_path / "out.onnx")
    with pytest.raises(VerificationError, match=r"This is a fault of the|executed \[.*\] experts"):
        verify_artifact(path, moe, plan, same, dtype="float32")
