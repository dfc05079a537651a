"""Corrected artifacts in onnxruntime against PyTorch, and what a correction adds to a graph."""

from __future__ import annotations

from collections import Counter
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
from alloc_moe.compiler.records import Correction
from alloc_moe.compiler.verify import parity as verify
from alloc_moe.compiler.verify.parity import Verification, verify_artifact
from alloc_moe.runtime.artifact.plan import AllocationPlan

Models = Callable[[str], MoeModel]
Graphs = Callable[[str], ir.Model]
Plans = Callable[..., AllocationPlan]


def random_corrections(moe: MoeModel, *, biased: bool) -> list[Correction | None]:
    """Return corrections of all MoE layers but the second, of about the size that is fitted."""
    random = np.random.default_rng(4)
    hidden = moe.config.hidden_size
    corrections: list[Correction | None] = [
        Correction(
            (1 + 0.2 * random.standard_normal(hidden)).astype(np.float32),
            0.1 * random.standard_normal((layer.num_experts, hidden), np.float32)
            if biased
            else None,
        )
        for layer in moe.layers
    ]
    corrections[1] = None
    return corrections


@pytest.fixture
def plan_of(plan_for: Plans, score_plan: Plans) -> Callable[[MoeModel, str], AllocationPlan]:
    """Return a function from a model and a redistribution to a plan that drops experts."""

    def make(moe: MoeModel, redistribution: str) -> AllocationPlan:
        if redistribution == "price":
            return score_plan(moe, "price")
        most = moe.layers[0].experts_per_token
        ks = [max(most - 1 - index % 2, 1) for index, _ in enumerate(moe.layers)]
        return plan_for(moe, ks, redistribution=redistribution)

    return make


def verified(
    graph: ir.Model,
    moe: MoeModel,
    plan: AllocationPlan,
    ids: NDArray[np.int64],
    path: Path,
    *,
    device: str,
    corrections: list[Correction | None],
    expected: list[Correction | None] | None = None,
    dtype: str = "float32",
) -> Verification:
    """Write the artifact with `corrections` and compare it with PyTorch with those `expected`."""
    package.save_graph(specialize(graph, plan, device=device, corrections=corrections), path)
    expected = corrections if expected is None else expected
    return verify_artifact(path, moe, plan, ids, dtype=dtype, corrections=expected)


@pytest.mark.parametrize("biased", [False, True], ids=["scale", "scale and bias"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("redistribution", ["none", "sequence", "price"])
def test_a_corrected_artifact_computes_what_the_reference_does(
    moe_model: Models,
    exported: Graphs,
    plan_of: Callable[[MoeModel, str], AllocationPlan],
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    family: str,
    redistribution: str,
    device: str,
    biased: bool,
) -> None:
    moe = moe_model(family)
    found = verified(
        exported(family),
        moe,
        plan_of(moe, redistribution),
        token_ids,
        tmp_path / "out.onnx",
        device=device,
        corrections=random_corrections(moe, biased=biased),
    )
    assert found.max_abs_logit_error < 1e-4


@pytest.mark.parametrize("left_out", ["bias", "scale"])
def test_a_correction_left_out_is_found(
    moe_model: Models,
    exported: Graphs,
    plan_of: Callable[[MoeModel, str], AllocationPlan],
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    left_out: str,
) -> None:
    moe = moe_model("olmoe")
    corrections = random_corrections(moe, biased=True)
    other = [
        given
        and Correction(
            np.ones_like(given.scale) if left_out == "scale" else given.scale,
            None if left_out == "bias" else given.bias,
        )
        for given in corrections
    ]
    with pytest.raises(VerificationError, match="differ from PyTorch"):
        verified(
            exported("olmoe"),
            moe,
            plan_of(moe, "none"),
            token_ids,
            tmp_path / "out.onnx",
            device="cpu",
            corrections=other,
            expected=corrections,
        )


def operators(model: ir.Model) -> Counter[tuple[str, str]]:
    """Return how often each operator occurs, model-local functions included."""
    bodies = [list(model.graph), *(list(function) for function in model.functions.values())]
    return Counter((node.domain, node.op_type) for body in bodies for node in body)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_correction_adds_no_node(
    moe_model: Models,
    exported: Graphs,
    plan_of: Callable[[MoeModel, str], AllocationPlan],
    family: str,
    device: str,
) -> None:
    moe = moe_model(family)
    plan, graph = plan_of(moe, "price"), exported(family)
    corrections = random_corrections(moe, biased=True)
    plain = specialize(graph, plan, device=device)
    corrected = specialize(graph, plan, device=device, corrections=corrections)
    assert operators(corrected) == operators(plain)
    assert [value.name for value in corrected.graph.inputs] == [
        value.name for value in plain.graph.inputs
    ]
    pairs = [
        [node for node in model.graph if node.op_type == "MoE"] for model in (plain, corrected)
    ]
    biased = moe.model.get_submodule(moe.layers[0].experts_name).has_bias
    for before, after, correction in zip(*pairs, corrections, strict=True):
        names = [[value and value.name for value in node.inputs] for node in (before, after)]
        assert names[0][:4] == names[1][:4]
        assert (names[0] == names[1]) == (correction is None)
        assert len(names[0]) == (6 if biased else 5)  # the last is a bias of the down projection
        assert len(names[1]) == (5 if correction is None and not biased else 6)
    added = set(corrected.graph.initializers) - set(plain.graph.initializers)
    assert len(added) == 2 * (len(moe.layers) - 1)  # a down projection and a bias of each


def test_without_corrections_the_artifact_stays_as_it_is(
    moe_model: Models,
    exported: Graphs,
    plan_of: Callable[[MoeModel, str], AllocationPlan],
    tmp_path: Path,
) -> None:
    moe = moe_model("olmoe")
    plan = plan_of(moe, "price")
    files = []
    for name, corrections in (("plain", ()), ("none", (None, None, None))):
        (tmp_path / name).mkdir()
        model = specialize(exported("olmoe"), plan, device="cpu", corrections=corrections)
        package.save_graph(model, tmp_path / name / "out.onnx")
        files.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert files[0] == files[1]


def test_one_export_serves_plans_with_and_without_corrections(
    moe_model: Models,
    exported: Graphs,
    plan_of: Callable[[MoeModel, str], AllocationPlan],
    token_ids: NDArray[np.int64],
    tmp_path: Path,
) -> None:
    moe, graph = moe_model("olmoe"), exported("olmoe")
    plan = plan_of(moe, "none")
    corrected = random_corrections(moe, biased=True)
    for number, corrections in enumerate(([None] * 3, corrected, [None] * 3)):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / "out.onnx"
        found = verified(graph, moe, plan, token_ids, path, device="cpu", corrections=corrections)
        assert found.max_abs_logit_error < 1e-4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_half_precision_artifacts_are_corrected(
    moe_model: Models,
    half_graph: ir.Model,
    plan_of: Callable[[MoeModel, str], AllocationPlan],
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    device: str,
) -> None:
    moe = moe_model("olmoe")
    corrections = random_corrections(moe, biased=True)
    found = verified(
        half_graph,
        moe,
        plan_of(moe, "none"),
        token_ids,
        tmp_path / "out.onnx",
        device=device,
        corrections=corrections,
        dtype="float16",
    )
    assert found.kl < verify.MAX_KL["float16"] / 100
