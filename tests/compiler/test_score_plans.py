"""Plans that decide by scores, from the graph of a whole model to the tokens it writes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from alloc_moe.compiler import package, verify
from alloc_moe.compiler.errors import VerificationError
from alloc_moe.compiler.pipeline import specialize
from alloc_moe.compiler.policies import SCORED
from alloc_moe.compiler.records import MoeModel
from alloc_moe.compiler.verify import verify_artifact
from alloc_moe.passes.stamp_plan import StampPlanPass
from alloc_moe.runtime.artifact import PLAN_KEY, AllocationPlan
from alloc_moe.runtime.generate import generate
from alloc_moe.runtime.session import ArtifactSession, open_session

Models = Callable[[str], MoeModel]
Graphs = Callable[[str], ir.Model]
Plans = Callable[..., AllocationPlan]

FAMILIES = ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2"]


def written(graph: ir.Model, plan: AllocationPlan, folder: Path, device: str = "cpu") -> Path:
    path = folder / "out.onnx"
    package.save_graph(specialize(graph, plan, device=device), path)
    return path


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("redistribution", SCORED)
@pytest.mark.parametrize("family", FAMILIES)
def test_artifacts_execute_what_the_reference_does(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    family: str,
    redistribution: str,
    device: str,
) -> None:
    moe = moe_model(family)
    plan = score_plan(moe, redistribution, weights="renorm" if family == "olmoe" else "keep")
    path = written(exported(family), plan, tmp_path, device)
    result = verify_artifact(path, moe, plan, token_ids, dtype="float32")
    assert result.max_abs_logit_error < 1e-4
    assert result.tokens == (108 if redistribution == "price" else 54)


@pytest.mark.parametrize("redistribution", SCORED)
def test_capped_artifacts_execute_what_the_reference_does(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    redistribution: str,
) -> None:
    moe = moe_model("olmoe")
    plan = score_plan(moe, redistribution, cap=1.0)
    path = written(exported("olmoe"), plan, tmp_path)
    verify_artifact(path, moe, plan, token_ids, dtype="float32")
    session = open_session(path, ep="cpu", count_activations=True)
    assert not session.has_dial
    for text in (token_ids[:, :1], token_ids[:1, :40], token_ids[:3]):
        counts = session.run(text).activations
        assert counts is not None
        assert all(
            count <= layer.k * text.size for count, layer in zip(counts, plan.layers, strict=True)
        )


def test_a_price_other_than_the_plans_is_refused(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
) -> None:
    moe = moe_model("olmoe")
    plan = score_plan(moe, "price")
    assert plan.price is not None
    other = dataclasses.replace(plan, price=1.5 * plan.price)
    graph = specialize(exported("olmoe"), other, device="cpu")
    StampPlanPass(PLAN_KEY, plan.to_json())(graph)
    package.save_graph(graph, tmp_path / "out.onnx")
    with pytest.raises(VerificationError, match="differ from PyTorch"):
        verify_artifact(tmp_path / "out.onnx", moe, plan, token_ids, dtype="float32")
    with pytest.raises(VerificationError, match=r"executed \[.*\] experts per layer where"):
        verify_artifact(tmp_path / "out.onnx", moe, plan, token_ids, dtype="float16")


@pytest.mark.parametrize("redistribution", ["threshold", "price"])
def test_half_precision_is_verified(
    moe_model: Models,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    redistribution: str,
) -> None:
    from alloc_moe.compiler.pipeline import export

    moe = moe_model("olmoe")
    plan = score_plan(moe, redistribution)
    path = written(export(moe, dtype="float16"), plan, tmp_path)
    result = verify_artifact(path, moe, plan, token_ids, dtype="float16")
    assert result.kl < verify.MAX_KL


def test_a_threshold_below_all_scores_gives_the_full_model(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    plan_for: Plans,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
) -> None:
    moe = moe_model("olmoe")
    full = plan_for(moe, [layer.experts_per_token for layer in moe.layers], redistribution="none")
    (tmp_path / "full").mkdir()
    expected = open_session(written(exported("olmoe"), full, tmp_path / "full"), ep="cpu")
    free = open_session(written(exported("olmoe"), score_plan(moe, "price"), tmp_path), ep="cpu")
    np.testing.assert_array_equal(
        free.run(token_ids[:3], price=0.0).logits, expected.run(token_ids[:3]).logits
    )


def logits_of(session: ArtifactSession, ids: NDArray[np.int64], **more: Any) -> NDArray[np.float32]:
    """Return the logits of a prefill and of a decoded token."""
    first = session.run(ids[:, :-1], **more)
    second = session.run(ids[:, -1:], cache=first.cache, **more)
    return np.concatenate([first.logits, second.logits], axis=1)


def test_one_artifact_equals_those_compiled_at_every_price(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
) -> None:
    plan = score_plan(moe_model("qwen2_moe"), "price")
    assert plan.price is not None
    dial = open_session(written(exported("qwen2_moe"), plan, tmp_path), ep="cpu")
    assert dial.has_dial
    seen = []
    for number, price in enumerate((0.0, plan.price, 2 * plan.price, 1e9)):
        (tmp_path / str(number)).mkdir()
        fixed = dataclasses.replace(plan, price=price)
        session = open_session(
            written(exported("qwen2_moe"), fixed, tmp_path / str(number)), ep="cpu"
        )
        logits = logits_of(dial, token_ids[:2], price=price)
        np.testing.assert_array_equal(logits, logits_of(session, token_ids[:2]))
        seen.append(logits)
        if price == plan.price:
            np.testing.assert_array_equal(logits, logits_of(dial, token_ids[:2]))
    assert all((a != b).any() for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("redistribution", ["threshold", "price", "sequence"])
def test_a_request_gets_the_same_tokens_alone_and_among_others(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    plan_for: Plans,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    redistribution: str,
    device: str,
) -> None:
    moe = moe_model("olmoe")
    plan = (
        plan_for(moe, [2, 3, 2], redistribution="sequence")
        if redistribution == "sequence"
        else score_plan(moe, redistribution)
    )
    session = open_session(
        written(exported("olmoe"), plan, tmp_path, device), ep="cpu", count_activations=True
    )
    lengths = (17, 3, 30, 9, 24)
    prompts = [row[:n].tolist() for row, n in zip(token_ids, lengths, strict=False)]
    alone = [generate(session, [p], max_new_tokens=8, eos_ids=())[0] for p in prompts]
    for order in ([0, 1, 2, 3, 4], [4, 1, 0, 3, 2], [1, 3]):
        together = generate(session, [prompts[i] for i in order], max_new_tokens=8, eos_ids=())
        assert together == [alone[i] for i in order]
    longest = prompts[2]
    padded, mask = np.zeros((2, 30), np.int64), np.ones((2, 30), np.int64)
    padded[0], padded[1, 21:], mask[1, :21] = longest, prompts[3], 0
    output = session.run(padded, attention_mask=mask)
    np.testing.assert_allclose(
        output.logits[1, 21:],
        session.run(np.array([prompts[3]])).logits[0],
        rtol=0,
        atol=1e-4,
    )
