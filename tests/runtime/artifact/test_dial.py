"""Budgets as prices, and artifacts run at them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from alloc_moe.runtime.artifact.dial import DialCurve, price_of
from alloc_moe.runtime.artifact.plan import AllocationPlan, Budget, DialPoint
from alloc_moe.runtime.commands.alloc_bench import bench_command
from alloc_moe.runtime.commands.alloc_inspect import inspect_command
from alloc_moe.runtime.commands.alloc_run import run_command
from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.measure.bench import Workload, benchmark
from alloc_moe.runtime.measure.evaluate import evaluate_artifact
from alloc_moe.runtime.text.generation import generate
from alloc_moe.runtime.text.model import load


def planned(*points: tuple[float, float], original: int = 40) -> AllocationPlan:
    dial = tuple(DialPoint(*point) for point in points)
    return AllocationPlan("m", Budget(0.5, 20, original), "price", "keep", (), 0.1, dial)


PLAN = planned((36.0, 0.01), (20.0, 0.04), (10.0, 0.16))


@pytest.mark.parametrize(
    ("budget", "price"),
    [
        ("36", 0.01),
        ("20", 0.04),
        ("0.5", 0.04),
        (0.5, 0.04),
        (20, 0.04),
        ("10", 0.16),
        ("0.25", 0.16),
        ("15", 0.08),  # halfway in the logarithm
        ("0.39", 0.08),  # rounded down to 15
        ("38", 0.005),
        ("40", 0.0),
        ("1.0", 0.0),
        (1.0, 0.0),
    ],
)
def test_budgets_have_prices(budget: str | float, price: float) -> None:
    assert price_of(PLAN, budget) == pytest.approx(price, rel=1e-12)


def test_points_of_the_table_are_exact() -> None:
    assert [price_of(PLAN, n) for n in (36, 20, 10)] == [0.01, 0.04, 0.16]


@given(activations=st.floats(10, 40))
def test_prices_lead_back_to_their_activations(activations: float) -> None:
    curve = DialCurve.of(PLAN)
    assert curve.activations(curve.price(activations)) == pytest.approx(activations, rel=1e-9)


def test_beyond_the_dial_the_fewest_run() -> None:
    assert DialCurve.of(PLAN).activations(3.0) == 10


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            "9",
            r"The budget 9 is 9 of 40 .* below .* dial\. Give a fraction from 0\.25 ",
        ),
        ("0.2", r"The budget 0\.2 is 8 of 40 .* whole number of activations from 10 to 40"),
        ("41", "41 of 40 activations per token, above"),
        ("1.5", r"The budget 1\.5 is no fraction in \(0, 1\]"),
        (0.0, r"The budget 0\.0 is no fraction"),
        ("half", "The budget 'half' is no positive number"),
        (math.nan, "The budget nan is no positive number"),
        ("-3", "The budget '-3' is no positive number"),
    ],
)
def test_budgets_off_the_dial_are_reported(budget: str | float, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        price_of(PLAN, budget)


@pytest.mark.parametrize(
    "plan",
    [
        planned(),
        dataclasses.replace(PLAN, redistribution="threshold"),
        dataclasses.replace(PLAN, cap=1.5),
    ],
)
def test_a_plan_without_a_dial_is_reported(plan: AllocationPlan) -> None:
    with pytest.raises(GenerationError, match="its plan has no dial"):
        price_of(plan, "0.5")


@given(
    points=st.lists(
        st.tuples(st.floats(5, 40), st.floats(0, 10, allow_subnormal=False)), min_size=1
    )
)
def test_a_higher_budget_never_has_a_higher_price(points: list[tuple[float, float]]) -> None:
    plan = planned(*points)
    prices = []
    for budget in range(40, 4, -1):
        try:
            prices.append(price_of(plan, budget))
        except GenerationError:
            break
    assert prices[0] == 0
    assert all(low <= high * (1 + 1e-9) for low, high in itertools.pairwise(prices))


def test_a_call_runs_at_its_price(dial_bundle: Path) -> None:
    session = open_session(dial_bundle, ep="cpu", count_activations=True)
    assert session.has_dial
    ids = np.arange(20)[None]
    counts = {price: session.run(ids, price=price).activations for price in (0.0, 0.1, 0.4, 2.0)}
    assert counts[0.0] == (40, 40)
    assert counts[2.0] == (0, 0)
    assert sum(counts[0.0]) > sum(counts[0.1] or ()) > sum(counts[0.4] or ()) > 0
    assert session.run(ids).activations == counts[0.1]


def test_a_price_needs_a_dial(toy: Path, dial_bundle: Path) -> None:
    session = open_session(toy, ep="cpu")
    assert not session.has_dial
    with pytest.raises(GenerationError, match="has its budget compiled in"):
        session.run(np.arange(3)[None], price=0.1)
    with pytest.raises(GenerationError, match=r"The price of an activation is -1"):
        open_session(dial_bundle, ep="cpu").run(np.arange(3)[None], price=-1)


def test_everything_that_runs_takes_a_price(dial_bundle: Path) -> None:
    session = open_session(dial_bundle, ep="cpu", count_activations=True)
    ids = list(range(30))
    cheap, dear = (evaluate_artifact(session, ids, window=16, price=p) for p in (0.0, 0.4))
    assert sum(cheap.activations or ()) > sum(dear.activations or ())
    assert cheap.loss != dear.loss
    free, none = (
        generate(session, [ids], max_new_tokens=12, eos_ids=(), price=p) for p in (0.0, 2.0)
    )
    assert free != none
    measured = benchmark(
        [session, session], Workload(4, 4, 2, 1), prices=[None, price_of(session.plan, "0.5")]
    )
    assert len(measured) == 2
    model = load(dial_bundle, ep="cpu")
    assert model.generate(["The"], budget=1.0, max_new_tokens=12)[0].ids == tuple(
        generate(session, [model.encode("The")], max_new_tokens=12, price=0.0)[0]
    )
    with pytest.raises(GenerationError, match=r"The budget 0\.1 is 0 of 8"):
        model.generate(["The"], budget="0.1")


def invoke(command: Any, *arguments: object) -> Any:
    outcome = CliRunner().invoke(command, [*map(str, arguments), "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    return json.loads(outcome.stdout)


def test_commands_take_budgets(dial_bundle: Path, toy: Path) -> None:
    options = (dial_bundle, "--ep", "cpu", "--prompt", "The", "--max-new-tokens", "12")
    model = load(dial_bundle, ep="cpu")
    for budget in ("1.0", "3"):
        (completion,) = invoke(run_command, *options, "--budget", budget)["completions"]
        expected = model.generate(["The"], budget=budget, max_new_tokens=12)
        assert completion["text"] == expected[0].text
    small = ("--prompt-tokens", 4, "--past", 4, "--new-tokens", 2, "--runs", 1, "--ep", "cpu")
    data = invoke(bench_command, dial_bundle, *small, "--budget", "0.5", "--budget", "1.0")
    assert [entry["price"] for entry in data["artifacts"]] == [None, 0.1, 0.0]
    assert data["artifacts"][1]["artifact"] == f"{dial_bundle} at 0.5"
    outcome = CliRunner().invoke(run_command, [*map(str, options), "--budget", "0.1"])
    assert outcome.exit_code == 1
    assert "below the artifact's dial" in outcome.stderr
    outcome = CliRunner().invoke(
        bench_command, [str(dial_bundle), str(toy), "--budget", "0.5", "--runs", "1"]
    )
    assert outcome.exit_code == 2
    assert "--budget is for one artifact" in outcome.stderr


def test_inspect_shows_what_the_plan_has(dial_bundle: Path, tmp_path: Path, make_toy: Any) -> None:
    text = CliRunner().invoke(inspect_command, [str(dial_bundle)]).stdout
    assert "0.1 per activation" in text
    assert "activations 7 at 0.05, 4 at 0.1, 2.5 at 0.4" in text.replace("\n", " ")
    assert "threshold" not in text
    plan = json.loads(PLAN.to_json())
    plan |= {"redistribution": "threshold", "cap": 1.5, "correction": {"kind": "affine"}}
    plan["layers"] = [
        {"name": "a", "experts": 4, "k_original": 2, "k": 1.2345, "threshold": 0.123456}
    ]
    make_toy(tmp_path / "out.onnx", plan=json.dumps(plan))
    text = CliRunner().invoke(inspect_command, [str(tmp_path / "out.onnx")]).stdout
    for shown in ("1.5 times k in every call", "kind affine", "threshold", "0.1235", "1.23"):
        assert shown in text


def test_plans_with_and_without_the_new_keys_survive_json(
    plan: AllocationPlan, dial_plan: AllocationPlan
) -> None:
    for one in (plan, dial_plan, dataclasses.replace(dial_plan, cap=1.5, correction={"a": 1})):
        assert AllocationPlan.from_json(one.to_json()) == one
    assert not {"price", "dial", "cap", "correction"} & set(json.loads(plan.to_json()))
    assert "threshold" not in json.loads(plan.to_json())["layers"][0]
