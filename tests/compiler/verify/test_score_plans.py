"""Plans that decide by scores, from the graph of a whole model to the tokens it writes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from alloc_moe.compiler.commands.alloc_eval import eval_command
from alloc_moe.compiler.errors import VerificationError
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.records import SCORED
from alloc_moe.compiler.verify import parity as verify
from alloc_moe.compiler.verify.parity import verify_artifact
from alloc_moe.passes.interface.stamp_plan import StampPlanPass
from alloc_moe.runtime.artifact.plan import PLAN_KEY, AllocationPlan
from alloc_moe.runtime.execution.session import ArtifactSession, open_session
from alloc_moe.runtime.text.generation import generate

Models = Callable[[str], MoeModel]
Graphs = Callable[[str], ir.Model]
Plans = Callable[..., AllocationPlan]
Written = Callable[..., Path]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("redistribution", SCORED)
def test_artifacts_execute_what_the_reference_does(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
    family: str,
    redistribution: str,
    device: str,
) -> None:
    moe = moe_model(family)
    plan = score_plan(moe, redistribution, weights="renorm" if family == "olmoe" else "keep")
    path = written(exported(family), plan, device=device)
    result = verify_artifact(path, moe, plan, token_ids, dtype="float32")
    assert result.max_abs_logit_error < 1e-4
    assert result.tokens == (108 if redistribution == "price" else 54)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_overlapping_experts_are_priced_as_in_the_reference(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
    family: str,
    device: str,
) -> None:
    moe = moe_model(family)
    plan = score_plan(moe, "price", overlap=0.5)
    assert AllocationPlan.from_json(plan.to_json()).overlap == 0.5
    path = written(exported(family), plan, device=device)
    assert verify_artifact(path, moe, plan, token_ids, dtype="float32").tokens == 108
    # Without the overlap other experts run.
    other = dataclasses.replace(plan, overlap=None)
    with pytest.raises(VerificationError, match=r"executed|logits"):
        verify_artifact(path, moe, other, token_ids, dtype="float32")


@pytest.mark.parametrize("redistribution", SCORED)
def test_capped_artifacts_execute_what_the_reference_does(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
    redistribution: str,
) -> None:
    moe = moe_model("olmoe")
    plan = score_plan(moe, redistribution, cap=1.0)
    path = written(exported("olmoe"), plan)
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
    half_graph: ir.Model,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
    redistribution: str,
) -> None:
    moe = moe_model("olmoe")
    plan = score_plan(moe, redistribution)
    path = written(half_graph, plan)
    result = verify_artifact(path, moe, plan, token_ids, dtype="float16")
    assert result.kl < verify.MAX_KL["float16"]


def test_a_threshold_below_all_scores_gives_the_full_model(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    plan_for: Plans,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    written: Written,
) -> None:
    moe = moe_model("olmoe")
    full = plan_for(moe, [layer.experts_per_token for layer in moe.layers], redistribution="none")
    (tmp_path / "full").mkdir()
    expected = open_session(written(exported("olmoe"), full, tmp_path / "full"), ep="cpu")
    free = open_session(written(exported("olmoe"), score_plan(moe, "price")), ep="cpu")
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
    written: Written,
) -> None:
    plan = score_plan(moe_model("qwen2_moe"), "price")
    assert plan.price is not None
    dial = open_session(written(exported("qwen2_moe"), plan), ep="cpu")
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
    written: Written,
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
        written(exported("olmoe"), plan, device=device), ep="cpu", count_activations=True
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


def bundled(moe: MoeModel, graph: ir.Model, plan: AllocationPlan, folder: Path) -> Path:
    model = specialize(graph, plan, device="cpu")
    package.save_graph(model, folder / "model.onnx")
    package.write_bundle_files(folder, moe, model, plan)
    return folder


def test_onnxruntime_genai_runs_an_artifact_with_a_dial(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    moe = moe_model("olmoe")
    folder = bundled(moe, exported("olmoe"), score_plan(moe, "price"), tmp_path)
    onnx.checker.check_model(folder / "model.onnx")
    session = open_session(folder, ep="cpu")
    assert session.has_dial
    prompt = token_ids[0, :20].tolist()
    expected = generate(session, [prompt], max_new_tokens=12, eos_ids=session.files.eos_ids())[0]
    parameters = genai.GeneratorParams(genai_model := genai.Model(str(folder)))
    parameters.set_search_options(max_length=32, do_sample=False)
    generator = genai.Generator(genai_model, parameters)
    generator.append_tokens(prompt)
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    assert tokens == expected[: len(tokens)]
    assert tokens


def evaluated(*arguments: object) -> Any:
    outcome = CliRunner().invoke(eval_command, [*map(str, arguments), "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    return json.loads(outcome.stdout)


@pytest.mark.parametrize("redistribution", ["threshold", "price"])
def test_alloc_eval_gives_the_same_for_artifact_and_plan(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    tmp_path: Path,
    redistribution: str,
) -> None:
    moe = moe_model("olmoe")
    plan = score_plan(moe, redistribution)
    folder = bundled(moe, exported("olmoe"), plan, tmp_path)
    (tmp_path / "text.txt").write_text("The committee of the House met again. " * 8)
    options = ["--text", tmp_path / "text.txt", "--window", 32]
    counts = []
    for budget in [(), ("--budget", "1.0")] if redistribution == "price" else [()]:
        artifact = evaluated(folder, "--ep", "cpu", *options, *budget)
        plan_file = folder / "allocation.json"
        model = evaluated(moe.checkpoint.folder, "--plan", plan_file, *options, *budget)
        assert artifact["activations"] == model["activations"]
        assert artifact["loss"] == pytest.approx(model["loss"], rel=1e-5)
        assert artifact["price"] == (0.0 if budget else None)
        counts.append(sum(artifact["activations_per_token"]))
    if redistribution == "price":
        assert counts[0] < counts[1] == plan.budget.original


def test_alloc_eval_reports_what_it_cannot_run(
    moe_model: Models, score_plan: Plans, tmp_path: Path
) -> None:
    moe = moe_model("olmoe")
    plan = dataclasses.replace(score_plan(moe, "threshold"), correction={"kind": "affine"})
    (tmp_path / "plan.json").write_text(plan.to_json())
    (tmp_path / "text.txt").write_text("Some text")
    text = ["--text", str(tmp_path / "text.txt")]
    with_plan = [str(moe.checkpoint.folder), *text, "--plan", str(tmp_path / "plan.json")]
    outcome = CliRunner().invoke(eval_command, with_plan)
    assert outcome.exit_code == 1
    assert "so it can't be run from the plan alone" in " ".join(outcome.stderr.split())
    plan = dataclasses.replace(plan, correction={})
    (tmp_path / "plan.json").write_text(plan.to_json())
    outcome = CliRunner().invoke(eval_command, [*with_plan, "--budget", "0.5"])
    assert outcome.exit_code == 1
    assert "has no dial" in outcome.stderr
    outcome = CliRunner().invoke(
        eval_command, [str(moe.checkpoint.folder), *text, "--budget", "0.5"]
    )
    assert outcome.exit_code == 2
    assert "--budget is for artifacts, and for models with a --plan" in outcome.stderr
