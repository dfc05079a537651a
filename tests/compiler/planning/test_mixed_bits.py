"""``--mixed-bits``: what it allocates, and whole compiles."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc_moe.compiler import artifact
from alloc_moe.compiler.commands.alloc_compile import compile_command
from alloc_moe.compiler.errors import BudgetError, ProfileError
from alloc_moe.compiler.export.normalize import export_model
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.planning.allocation import cost_limit, parse_budget
from alloc_moe.compiler.planning.costs import CostTable, mixed_costs
from alloc_moe.compiler.planning.goals import planner
from alloc_moe.compiler.planning.mixed_bits import allocate_mixed, mixed_allocation
from alloc_moe.compiler.planning.shapes import ExpertShape
from alloc_moe.compiler.records import MoeLayer, SensitivityProfile
from alloc_moe.compiler.rounding.formats import (
    MIXED_BITS,
    choose_formats,
    formats_of_bits,
    mixed_formats,
)
from alloc_moe.compiler.rounding.weights import (
    float_weights,
    quantized,
    with_expert_formats,
    with_float_experts,
)
from alloc_moe.passes.blockwise import BlockFormat
from alloc_moe.runtime.artifact.files import find_artifact
from alloc_moe.runtime.artifact.plan import AllocationPlan, Budget

Rows = list[tuple[float, ...]]


def profile_from(rows: Rows, bits: tuple[int, ...] = MIXED_BITS) -> SensitivityProfile:
    names = tuple(f"layers.{index}.mlp" for index in range(len(rows)))
    most = tuple(len(row) // max(1, len(bits)) for row in rows)
    return SensitivityProfile(
        "fisher", "m", "c", 8, 4, 0, names, most, tuple(rows), 1.0, 0.0, bits=bits
    )


def layers_of(profile: SensitivityProfile) -> list[MoeLayer]:
    pairs = zip(profile.layer_names, profile.experts_per_token, strict=True)
    return [MoeLayer(name, f"{name}.experts", i, 8, k) for i, (name, k) in enumerate(pairs)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Rows, list[ExpertShape], list[int], int, str]:
    """Costs, shapes and blocks of some layers, the bits of the budget's reference, the budget."""
    most = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    cost = st.integers(0, 6).map(float)
    rows = [tuple(draw(st.lists(cost, min_size=2 * k, max_size=2 * k))) for k in most]
    shapes = [ExpertShape(8, k, 64, draw(st.sampled_from([64, 192]))) for k in most]
    blocks = [draw(st.sampled_from([16, 64])) for _ in most]
    return (
        rows,
        shapes,
        blocks,
        draw(st.sampled_from(MIXED_BITS)),
        draw(st.sampled_from(["0.35", "0.5", "0.8", "1.0"])),
    )


@settings(max_examples=60, deadline=None)
@given(cases())
def test_experts_and_bits_equal_brute_force(
    case: tuple[Rows, list[ExpertShape], list[int], int, str],
) -> None:
    rows, shapes, blocks, bits, requested = case
    profile = profile_from(rows)
    most = profile.experts_per_token
    formats = [[BlockFormat(width, block) for width in MIXED_BITS] for block in blocks]
    costs = mixed_costs(shapes, formats, dtype=f"int{bits}", bits=bits)
    budget = parse_budget("1.0", most, kind="bytes")
    budget = dataclasses.replace(budget, requested=float(requested))

    def of(plan: tuple[tuple[int, int], ...]) -> tuple[float, float]:
        """Return cost and bytes of a plan of (width, k)."""
        loss, nbytes = 0.0, 0.0
        for layer, (width, k) in enumerate(plan):
            loss += rows[layer][width * most[layer] + k - 1]
            nbytes += k * shapes[layer].parameters * formats[layer][width].bits_per_weight / 8
        return loss, nbytes

    full = tuple((MIXED_BITS.index(bits), k) for k in most)
    limit = Fraction(requested) * Fraction(of(full)[1])
    every = itertools.product(*(itertools.product(range(2), range(1, k + 1)) for k in most))
    within = [of(plan) for plan in every if of(plan)[1] <= limit]
    if not within:
        with pytest.raises(BudgetError):
            allocate_mixed(profile, layers_of(profile), budget, costs)
        return
    found = allocate_mixed(profile, layers_of(profile), budget, costs)
    widths = [MIXED_BITS.index(width) for width in found.bits]
    assert of(tuple(zip(widths, found.ks, strict=True))) == min(within)
    # What goes on to later stages is that of the chosen bits.
    assert float(found.costs.total(found.ks)) == min(within)[1]
    assert cost_limit(budget, found.costs) == limit
    chosen = (row[k - 1] for row, k in zip(found.profile.costs, found.ks, strict=True) if row)
    assert sum(chosen) == min(within)[0]


def test_bytes_have_the_scales_of_the_real_block() -> None:
    shape = ExpertShape(experts=8, experts_per_token=2, hidden=64, intermediate=32)
    formats = [[BlockFormat(bits, block) for bits in MIXED_BITS] for block in (64, 32)]
    table = mixed_costs([shape, shape], formats, dtype="int4", bits=4)
    weights = 3 * 64 * 32 / 8
    assert table.prices == (
        (4.5 * weights, 9 * weights, 8.5 * weights, 17 * weights),
        (5 * weights, 10 * weights, 9 * weights, 18 * weights),
    )
    assert table.original == (9 + 10) * weights
    assert table.cheapest == (4.5 + 5) * weights
    assert mixed_costs([shape], formats[:1], dtype="int8", bits=8).original == 17 * weights


def test_a_profile_without_bits_is_refused() -> None:
    profile = profile_from([(1.0, 0.0)], bits=())
    shape = ExpertShape(8, 2, 64, 64)
    costs = mixed_costs(
        [shape], [[BlockFormat(bits, 64) for bits in MIXED_BITS]], dtype="int4", bits=4
    )
    budget = parse_budget("0.5", [2], kind="bytes")
    with pytest.raises(ProfileError, match="costs of experts in one width only"):
        allocate_mixed(profile, layers_of(profile), budget, costs)


def test_rounding_after_the_choice_gives_the_same_weights(
    checkpoint: Callable[[str], Path],
) -> None:
    moe = load_model(str(checkpoint("deepseek_v2")))
    chosen = choose_formats(moe.checkpoint, "int4")
    formats = formats_of_bits(mixed_formats(chosen), (4, 8))
    later = quantized(moe, chosen, round_experts=False)
    assert later.quantization is not None
    assert later.quantization.experts == ()
    later = with_expert_formats(later, formats)
    other = load_model(str(checkpoint("deepseek_v2")))
    at_once = quantized(other, dataclasses.replace(chosen, experts=formats))
    assert later.quantization is not None
    assert at_once.quantization is not None
    marks = at_once.quantization.marks
    assert dataclasses.replace(later.quantization, marks=marks) == at_once.quantization
    assert later.fingerprint not in (at_once.fingerprint, moe.fingerprint)
    for (name, found), expected in zip(
        later.model.named_parameters(), at_once.model.parameters(), strict=True
    ):
        assert torch.equal(found, expected), name


def test_layers_that_are_read_to_run_have_experts_of_the_bits_chosen(
    checkpoint: Callable[[str], Path],
) -> None:
    models = []
    for offload in ("never", "always"):
        moe = load_model(str(checkpoint("deepseek_v2")), offload=offload)  # type: ignore[arg-type]
        chosen = choose_formats(moe.checkpoint, "int4")
        moe = quantized(moe, chosen, round_experts=False)
        models.append(with_expert_formats(moe, formats_of_bits(mixed_formats(chosen), (4, 8))))
    expected, actual = models
    assert actual.fingerprint == expected.fingerprint
    assert actual.offloading is not None
    ids = torch.arange(12)[None]

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            return [moe.model(input_ids=ids).logits for moe in (expected, actual)]

    rounded, rounded_when_read = outputs()
    assert torch.equal(rounded_when_read, rounded)
    with float_weights(expected), float_weights(actual):
        floats, floats_when_read = outputs()
    assert torch.equal(floats_when_read, floats)
    assert not torch.equal(floats, rounded)
    assert all(torch.equal(found, rounded) for found in outputs())
    for moe in models:
        before = with_float_experts(moe)
        assert before.quantization is not None
        assert before.quantization.experts == ()
        other = with_expert_formats(before, formats_of_bits(mixed_formats(chosen), (8, 4)))
        assert other.fingerprint != moe.fingerprint
    fresh = load_model(str(checkpoint("deepseek_v2")))
    fresh = quantized(fresh, choose_formats(fresh.checkpoint, "int4"), round_experts=False)
    fresh = with_expert_formats(fresh, formats_of_bits(mixed_formats(chosen), (8, 4)))
    with torch.no_grad():
        otherwise = fresh.model(input_ids=ids).logits
    assert all(torch.equal(found, otherwise) for found in outputs())


@pytest.fixture(scope="module")
def graph(checkpoint: Callable[[str], Path]) -> ir.Model:
    """The model's graph, exported once: the experts' bits come in later."""
    moe = load_model(str(checkpoint("olmoe")))
    chosen = choose_formats(moe.checkpoint, "int4")
    return export_model(dataclasses.replace(moe, quantization=chosen), dtype="int4")


@pytest.fixture
def model(
    checkpoint: Callable[[str], Path], graph: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> Path:
    monkeypatch.setattr(artifact, "export_model", lambda *_, **__: graph)
    return checkpoint("olmoe")


def compiled(model: Path, output: Path, *options: str) -> Result:
    arguments = [str(model), "--budget", "0.8", "--tokens", "256", "-o", str(output)]
    # The fixture's graph has the trained weights, not values chosen on a text.
    common = ["--dtype", "int4", "--mixed-bits", "--rounding", "nearest"]
    return CliRunner().invoke(compile_command, [*arguments, *common, *options])


def test_an_artifact_has_layers_of_both_widths(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    outcome = compiled(model, output, "-q")
    assert outcome.exit_code == 0, outcome.output
    plan = find_artifact(output).plan
    bits = [layer.bits for layer in plan.layers]
    assert set(bits) == {4, 8}
    assert plan.quantization["expert_bits"] == bits
    assert plan.quantization["expert_block"] == [32] * 3
    nodes = [node for node in ir.load(output).graph if node.op_type == "QMoE"]
    assert [node.attributes["expert_weight_bits"].as_int() for node in nodes] == bits
    assert [node.attributes["block_size"].as_int() for node in nodes] == [32] * 3
    # Verified against the same rounded weights, and against floats.
    assert plan.verify["max_abs_logit_error"] < 1e-3
    assert 0 < plan.verify["kl"] < 1
    assert plan.redistribution == "threshold"
    assert (plan.cost["kind"], plan.cost["dtype"]) == ("bytes", "int4")
    assert plan.cost["original"] == 12 * 3 * 64 * 32 * 5 / 8
    assert plan.cost["planned"] <= plan.cost["limit"] == 0.8 * plan.cost["original"]
    read = sum(round(layer.k) * 3 * 64 * 32 * (layer.bits + 1) / 8 for layer in plan.layers)
    assert plan.cost["planned"] == read
    assert f"Bits per layer: {' '.join(map(str, bits))}\n" in outcome.stdout
    assert AllocationPlan.from_json(plan.to_json()) == plan


def test_values_are_chosen_on_the_text_in_both_widths(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both(
        profile: SensitivityProfile, layers: list[MoeLayer], _: Budget, costs: CostTable
    ) -> Any:
        return mixed_allocation(profile, layers, costs, [7, 3, 8])  # 3, 3 and 4 experts

    monkeypatch.setattr(planner, "allocate_mixed", both)
    model = checkpoint("olmoe")
    output, profile = tmp_path / "out.onnx", tmp_path / "p.json"
    given = ("-q", "--profile", str(profile))
    outcome = compiled(model, output, *given, "--rounding", "gptq")
    assert outcome.exit_code == 0, outcome.output
    plan = find_artifact(output).plan
    assert plan.quantization["rounding"] == "gptq"
    assert plan.quantization["expert_bits"] == [8, 4, 8]
    # Every logit is that of PyTorch with the chosen values: rounded to the nearest it would not be.
    assert plan.verify["max_abs_logit_error"] < 1e-3
    assert "/gptq-4-8:" in json.loads(profile.read_bytes())["model_fingerprint"]
    outcome = compiled(model, tmp_path / "nearest.onnx", *given)
    assert outcome.exit_code == 1
    assert "was measured differently: the model" in " ".join(outcome.stderr.split())


def test_layers_that_are_read_to_run_give_the_same_plan(model: Path, tmp_path: Path) -> None:
    plans = []
    for offload in ("never", "always"):
        output = tmp_path / f"{offload}.onnx"
        outcome = compiled(model, output, "-q", "--offload", offload)
        assert outcome.exit_code == 0, outcome.output
        plans.append(find_artifact(output).plan)
    expected, actual = plans
    assert actual.layers == expected.layers
    assert actual.quantization == expected.quantization
    assert actual.verify["kl"] == pytest.approx(expected.verify["kl"], rel=1e-3)
    assert actual.verify["max_abs_logit_error"] < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        ("--redistribute", "none", "--refine", "1"),
        ("--redistribute", "batch", "--cost", "bytes", "--cost-batch", "2", "--correct", "none"),
        ("--budget", "1.0", "--sensitivity", "output"),
    ],
)
def test_other_options_go_with_it(model: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    output = tmp_path / "out.onnx"
    outcome = compiled(model, output, "-q", *options)
    assert outcome.exit_code == 0, outcome.output
    plan = find_artifact(output).plan
    assert plan.cost["planned"] <= plan.cost["limit"]
    assert {layer.bits for layer in plan.layers} <= {4, 8}
    assert plan.quantization["expert_bits"] == [layer.bits for layer in plan.layers]


def test_a_profile_is_used_again_for_another_budget_but_not_for_one_width(
    model: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "p.json"
    given = ("--profile", str(profile), "-q")
    assert compiled(model, tmp_path / "a.onnx", *given).exit_code == 0
    before = profile.read_bytes()
    assert json.loads(before)["bits"] == [4, 8]
    assert compiled(model, tmp_path / "b.onnx", *given, "--budget", "0.5").exit_code == 0
    assert profile.read_bytes() == before
    arguments = [str(model), "--budget", "0.8", "--tokens", "256", "-o", str(tmp_path / "c.onnx")]
    one_width = ["--dtype", "int4", "--cost", "bytes"]
    outcome = CliRunner().invoke(compile_command, [*arguments, *one_width, *given])
    assert outcome.exit_code == 1
    assert "the bits of experts (there 4/8, now none) changed" in " ".join(outcome.stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "float32"], "needs --dtype int4 or int8"),
        (["--cost", "activations"], "budgets bytes, so --cost activations can't be met"),
        (["--cost", "latency"], "budgets bytes, so --cost latency can't be met"),
        (["--allocation", "uniform"], "which --allocation uniform ignores"),
        (["--sensitivity", "kl"], "needs --sensitivity fisher or output; kl doesn't measure"),
        (["--sensitivity", "ppl-suffix"], "ppl-suffix doesn't measure the rounding of weights"),
        (["--sensitivity", "data-free"], "data-free doesn't measure the rounding of weights"),
        (["--redistribute", "price"], "which price does by itself"),
        (["--redistribute", "top-p"], "which top-p does by itself"),
        (["--redistribute", "ratio"], "Use --redistribute threshold, batch, sequence or none"),
    ],
)
def test_what_it_cant_be_combined_with_is_wrong_usage(
    tmp_path: Path, options: list[str], message: str
) -> None:
    outcome = compiled(tmp_path, tmp_path / "out.onnx", *options)
    assert outcome.exit_code == 2
    assert message in outcome.stderr
