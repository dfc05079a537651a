"""``--target-bytes`` and ``--target-loss``: what their plans read and add, and whole compiles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from click.testing import CliRunner

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.commands.alloc_compile import compile_command
from alloc_moe.compiler.errors import BudgetError
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.planning.goals import search
from alloc_moe.compiler.planning.goals.planner import Planner
from alloc_moe.compiler.planning.goals.search import full_loss, meet_goal
from alloc_moe.compiler.planning.goals.traffic import WeightsRead, weights_read
from alloc_moe.compiler.records import Compiled, Goal, Planned, PlanOptions
from alloc_moe.compiler.reference.experts import under_plan
from alloc_moe.compiler.rounding.formats import choose_formats, mixed_formats
from alloc_moe.compiler.rounding.weights import quantized, with_float_experts
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.passes.blockwise import dequantize, quantize
from alloc_moe.runtime.artifact.files import find_artifact
from alloc_moe.runtime.console import Console

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def text(calibration: CalibrationSet, own_text: torch.Tensor) -> CalibrationSet:
    """What the model wrote: there fewer experts can but add to the loss."""
    ids = own_text.numpy()
    return dataclasses.replace(calibration, ids=ids, tokens=ids.size, sequence_length=ids.shape[1])


@pytest.fixture(scope="module")
def planners(
    checkpoint: Callable[[str], Path], text: CalibrationSet
) -> Callable[..., tuple[Planner, WeightsRead, float]]:
    """Return a function from a policy, and whether bits are mixed, to what plans are made from."""

    def make(redistribution: str, *, mixed: bool = False) -> tuple[Planner, WeightsRead, float]:
        moe = load_model(str(checkpoint("olmoe")))
        loss = full_loss(moe, text, QUIET)
        formats: Any = ()
        dtype, chosen = "float32", None
        if mixed:
            dtype, chosen = "int4", choose_formats(moe.checkpoint, "int4")
            formats = mixed_formats(chosen)
            moe = quantized(moe, chosen, round_experts=False)
        reading = weights_read(moe.checkpoint, dtype=dtype, quantization=chosen, formats=formats)
        profile = measure_sensitivity(
            moe,
            text,
            metric="fisher",
            redistribution=redistribution,  # type: ignore[arg-type]
            correction="affine",
            formats=formats,
        )
        options = PlanOptions(redistribution, dial=False)  # type: ignore[arg-type]
        return Planner(moe, text, options, profile, formats, None, QUIET), reading, loss

    return make


def text_loss(moe: MoeModel, planned: Planned | None, ids: torch.Tensor) -> float:
    """Return the loss in nats per token, by the library's own forward."""

    def run() -> float:
        with torch.no_grad():
            logits = moe.model(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()

    if planned is None:
        return run()
    with under_plan(moe, planned.plan, planned.corrections):
        return run()


@pytest.mark.parametrize("redistribution", ["price", "threshold"])
def test_a_loss_is_met_by_what_was_measured(
    planners: Callable[..., tuple[Planner, WeightsRead, float]],
    text: CalibrationSet,
    redistribution: str,
) -> None:
    planner, reading, loss = planners(redistribution)
    ids = torch.from_numpy(text.ids)
    assert loss == pytest.approx(text_loss(planner.moe, None, ids), abs=1e-6)
    most = reading.others + float(reading.costs(shifted=True).cheapest)
    _, smallest = meet_goal(Goal("bytes", most), planner, reading, loss)
    goal = Goal("loss", 0.5 * (text_loss(planner.moe, smallest, ids) - loss))
    assert goal.most > 0
    moe, planned = meet_goal(goal, planner, reading, loss)
    target = planned.plan.target
    measured = text_loss(moe, planned, ids) - loss
    assert target["added_loss"] == pytest.approx(measured, abs=1e-6)
    assert measured <= goal.most
    assert target["bytes"] < target["bytes_original"]
    assert (target["asked"], target["most"]) == ("loss", goal.most)


def test_bits_and_experts_of_a_loss_are_those_that_were_measured(
    planners: Callable[..., tuple[Planner, WeightsRead, float]],
    text: CalibrationSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planner, reading, loss = planners("threshold", mixed=True)
    monkeypatch.setattr(search, "_NEAR", 1.0)  # all tries are made, and a better one is kept
    ids = torch.from_numpy(text.ids)
    floats = text_loss(planner.moe, None, ids) - loss
    goal = Goal("loss", floats + 0.02)
    moe, planned = meet_goal(goal, planner, reading, loss)
    target = planned.plan.target
    assert target["added_loss"] == pytest.approx(text_loss(moe, planned, ids) - loss, abs=1e-6)
    assert target["added_loss"] <= goal.most
    assert moe.quantization is not None
    bits = [form.bits for form in moe.quantization.experts]
    assert bits == [layer.bits for layer in planned.plan.layers]
    for layer, form in zip(moe.layers, moe.quantization.experts, strict=True):
        name = f"{layer.experts_name}.down_proj"
        floats = moe.checkpoint.reader.read(name, torch.float32).numpy()
        expected = torch.from_numpy(dequantize(*quantize(floats, form), form))
        assert torch.equal(moe.model.get_parameter(name), expected)


def test_thresholds_that_read_more_than_was_asked_get_less(
    planners: Callable[..., tuple[Planner, WeightsRead, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    planner, reading, loss = planners("threshold", mixed=True)
    goal = Goal("bytes", 75_000)
    moe, first = meet_goal(goal, planner, reading, loss)
    assert first.plan.target["bytes"] <= 75_000
    planner = dataclasses.replace(planner, moe=with_float_experts(moe))
    found, counted = [], WeightsRead.counted

    def more(reading: WeightsRead, *given: Any) -> float:
        found.append(counted(reading, *given))
        return found[-1] + 9_000 * (len(found) == 1)

    monkeypatch.setattr(WeightsRead, "counted", more)
    _, second = meet_goal(goal, planner, reading, loss)
    assert len(found) == 2
    assert second.plan.target["bytes_predicted"] < first.plan.target["bytes_predicted"]
    assert second.plan.target["bytes"] == round(found[1]) <= 75_000


def test_a_loss_that_no_plan_reaches_is_refused_with_the_nearest(
    planners: Callable[..., tuple[Planner, WeightsRead, float]],
) -> None:
    planner, reading, loss = planners("threshold", mixed=True)
    with pytest.raises(BudgetError, match=r"--target-loss 1e-09 wasn't reached.*Give 0\.\d+ or"):
        meet_goal(Goal("loss", 1e-9), planner, reading, loss)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_loss_that_predictions_call_out_of_reach_is_sought_with_fewer_experts(
    planners: Callable[..., tuple[Planner, WeightsRead, float]],
    monkeypatch: pytest.MonkeyPatch,
    mixed: bool,
) -> None:
    planner, reading, loss = planners("threshold", mixed=mixed)

    def added(_: object, made: Any, full: float) -> float:
        return 0.1 if made.nbytes > 0.9 * reading.most else -0.1

    monkeypatch.setattr(search._Search, "_added", added)
    _, planned = meet_goal(Goal("loss", 1e-9), planner, reading, loss)
    assert planned.plan.target["added_loss"] == -0.1
    assert planned.plan.target["bytes"] <= 0.9 * reading.most


def test_all_experts_in_eight_bits_need_no_room_for_shifts(
    planners: Callable[..., tuple[Planner, WeightsRead, float]],
) -> None:
    planner, reading, loss = planners("threshold", mixed=True)
    _, planned = meet_goal(Goal("bytes", reading.most), planner, reading, loss)
    assert planned.plan.target["bytes"] == round(reading.most)
    assert {layer.bits for layer in planned.plan.layers} == {8}


def test_bytes_that_shifts_alone_exceed_are_tried(
    planners: Callable[..., tuple[Planner, WeightsRead, float]],
) -> None:
    planner, reading, loss = planners("threshold")
    goal = Goal("bytes", reading.others + float(reading.costs(shifted=False).cheapest))
    search.reachable(goal, reading, needs_token_sizes=False)
    with pytest.raises(BudgetError, match=r"reads \d+ bytes of weights already"):
        meet_goal(goal, planner, reading, loss)
    options = dataclasses.replace(planner.options, correction="none")
    plain = dataclasses.replace(planner, options=options)
    _, planned = meet_goal(goal, plain, reading, loss)
    assert planned.plan.target["bytes"] == goal.most


def test_bytes_give_the_plan_of_the_largest_budget_that_reads_no_more(
    compile_to: Callable[..., Compiled], tmp_path: Path
) -> None:
    plan = compile_to(tmp_path / "a.onnx", target_bytes="0.45MB").plan
    target = plan.target
    assert target["bytes"] <= target["bytes_predicted"] <= target["most"] == 450_000
    expert = 3 * 64 * 32 * 4 + 64 * 4  # and its shift
    assert target["bytes_predicted"] + expert > 450_000
    assert isinstance(plan.budget.requested, int)
    assert all(layer.token_sizes is not None for layer in plan.layers)
    same = compile_to(tmp_path / "b.onnx", budget=plan.budget.requested).plan
    assert dataclasses.replace(plan, target={}) == same


def test_maps_of_token_sizes_give_way_to_all_experts_and_to_any_plan_at_all(
    planners: Callable[..., tuple[Planner, WeightsRead, float]],
) -> None:
    without = planners("price")[1]
    reading = dataclasses.replace(without, token_sizes=1000)
    full, least = without.most, without.others + float(without.costs(shifted=False).cheapest)
    shifts = float(without.costs(shifted=True).cheapest - without.costs(shifted=False).cheapest)
    assert shifts > 0

    def maps(nbytes: float, *, needed: bool = False) -> int:
        goal = Goal("bytes", nbytes)
        return search.reachable(goal, reading, needs_token_sizes=needed).token_sizes

    roomy = least + shifts + 1000
    assert [maps(most) for most in (least, roomy - 1, full, full + 999)] == [0] * 4
    assert [maps(most) for most in (roomy, full - 1, full + 1000)] == [1000] * 3
    assert maps(full, needed=True) == 1000
    reading = dataclasses.replace(reading, dial=False)
    assert [maps(most, needed=True) for most in (full - 1, full, 1e9)] == [1000, 0, 0]
    for needed, most in ((True, least), (False, least - 1)):
        with pytest.raises(BudgetError, match="with one expert in each MoE layer"):
            maps(most, needed=needed)


def test_maps_of_token_sizes_that_cost_more_than_they_are_worth_are_left_out(
    planners: Callable[..., tuple[Planner, WeightsRead, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    without = planners("price")[1]
    experts = (without.most - without.others) / 2
    for share, kept in ((0.05, True), (0.07, False)):
        nbytes = round(share * experts)
        reading = dataclasses.replace(without, token_sizes=nbytes)
        goal = Goal("bytes", reading.always + experts)
        found = search.reachable(goal, reading, needs_token_sizes=False)
        assert (found.token_sizes == nbytes) is kept
        assert search.reachable(goal, reading, needs_token_sizes=True) == reading
        search.tell_left_out(goal, reading, found, Console())
        told = f"Token sizes are left out: they would take {nbytes} of the bytes"
        assert (told in " ".join(capsys.readouterr().err.split())) is not kept


def test_a_threshold_keeps_to_the_bytes_with_its_own_k_per_layer(
    compile_to: Callable[..., Compiled], tmp_path: Path
) -> None:
    plan = compile_to(tmp_path / "a.onnx", target_bytes=450_000, redistribute="threshold").plan
    assert plan.target["bytes"] <= plan.target["bytes_predicted"] <= 450_000
    assert plan.cost["planned"] <= plan.cost["limit"]
    full = compile_to(tmp_path / "b.onnx", target_bytes="1GB", redistribute="threshold").plan
    assert full.budget.activations == full.budget.original
    assert full.target["bytes"] == full.target["bytes_original"]


def command(model: Path, output: Path, *options: str) -> Any:
    arguments = [str(model), "--tokens", "256", "-q", "-o", str(output), *options]
    return CliRunner().invoke(compile_command, arguments)


def test_mixed_bits_chosen_on_the_text_keep_to_the_bytes(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.onnx"
    options = ("--dtype", "int4", "--mixed-bits", "--rounding", "gptq", "--target-bytes", "75KB")
    outcome = command(checkpoint("olmoe"), output, *options)
    assert outcome.exit_code == 0, outcome.output
    plan = find_artifact(output).plan
    assert plan.target["bytes"] <= 75_000
    assert plan.verify["max_abs_logit_error"] < 1e-3
    expected = f"Weights read per token: {plan.target['bytes']} bytes, of "
    assert expected in outcome.stdout
    assert ", at most 75000\n" in outcome.stdout


def test_a_loss_is_told_with_what_was_predicted(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.onnx"
    outcome = command(checkpoint("olmoe"), output, "--target-loss", "0.5")
    assert outcome.exit_code == 0, outcome.output
    target = find_artifact(output).plan.target
    assert target["added_loss"] <= 0.5
    told = f"{target['added_loss']:.4g} nats per token, predicted "
    assert told in outcome.stdout
    assert json.loads(json.dumps(target)) == target


def test_too_few_bytes_are_refused_with_the_range(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    outcome = command(checkpoint("olmoe"), tmp_path / "out.onnx", "--target-bytes", "1000")
    assert outcome.exit_code == 1
    words = " ".join(outcome.stderr.split())
    assert "--target-bytes is 1000, but with one expert in each MoE layer a token reads" in words
    assert "which all experts take, or another --dtype" in words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give one of --budget, --target-bytes and --target-loss."),
        (["--budget", "0.5", "--target-loss", "1"], "each decides how many experts run"),
        (["--target-bytes", "9", "--target-loss", "1"], "each decides how many experts run"),
        (["--target-bytes", "many"], "Give a number of bytes such as 1500000, 1500KB"),
        (["--target-bytes", "9", "--cost", "bytes"], "--target-bytes goes by bytes that a token"),
        (["--target-loss", "1", "--cost-batch", "2"], "is of one token, so leave out --cost-batch"),
        (["--target-loss", "1", "--refine", "2"], "chooses the plan by itself, so leave out"),
        (["--target-loss", "1", "--redistribute", "ratio"], "which ratio doesn't tell"),
        (["--target-loss", "1", "--allocation", "uniform"], "--allocation uniform ignores"),
        (["--target-loss", "1", "--sensitivity", "output"], "fisher or kl; output isn't in nats"),
    ],
)
def test_what_can_not_be_combined_is_wrong_usage(
    tmp_path: Path, options: list[str], message: str
) -> None:
    outcome = command(tmp_path, tmp_path / "out.onnx", *options)
    assert outcome.exit_code == 2
    assert message in outcome.stderr
