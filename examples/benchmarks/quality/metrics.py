"""How well each sensitivity metric predicts what a plan costs.

Random plans at several budgets run in PyTorch on held-out text. What each adds to the loss is
ranked against what the metrics predict, the sum of their costs over the layers, which is what the
allocation minimises. A second table has the loss added by the plan that each metric chooses.
Results are kept: an interrupted run goes on where it was.

    python examples/benchmarks/quality/metrics.py examples/tiny-moe \
        --text examples/tiny-moe/heldout.txt -o metrics.json

With ``--correct affine`` one other table is made instead: the loss added by the plans that metrics
choose when they are measured plainly, under the redistribution, and with the correction as well.
All plans run under that redistribution with corrections fitted to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import click
import numpy as np
from plan_losses import Losses, corrector
from predictors import Predictor, choices, correlations, predictor

from alloc_moe.compiler.calibration.windows import CalibrationSet, calibrate, load_calibration
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.planning.allocation import parse_budget, uniform_allocation
from alloc_moe.compiler.planning.knapsack import solve_allocation
from alloc_moe.compiler.records import (
    CalibrationOptions,
    CorrectionMode,
    Metric,
    Redistribution,
    SensitivityProfile,
)
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.runtime.console import Console

METRICS: tuple[Metric, ...] = get_args(Metric)


@click.command()
@click.argument("model")
@click.option("--text", required=True, help="Held-out text.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Results, as JSON."
)
@click.option("--budgets", default="0.25,0.375,0.5,0.75", show_default=True)
@click.option("--plans", default=100, show_default=True, help="Random plans, over all budgets.")
@click.option("--tokens", default=8192, show_default=True, help="Calibration tokens.")
@click.option("--text-tokens", default=8192, show_default=True, help="Held-out tokens.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--redistribute",
    type=click.Choice(["none", "sequence"]),
    default="none",
    show_default=True,
    help="What the plans and the profiles are measured under; windows are sequences.",
)
@click.option(
    "--correct",
    "correction",
    type=click.Choice(["none", "gain", "affine"]),
    default="none",
    show_default=True,
    help="Show what measuring with this in place changes, instead of random plans.",
)
@click.option("--metrics", default=",".join(METRICS), show_default=True)
def main(
    model: str,
    text: str,
    output: Path,
    budgets: str,
    plans: int,
    tokens: int,
    text_tokens: int,
    seed: int,
    redistribute: Redistribution,
    correction: CorrectionMode,
    metrics: str,
) -> None:
    """Measure random plans of MODEL and print two Markdown tables, or another with --correct."""
    console = Console()
    moe = load_model(model, console)
    options = CalibrationOptions(tokens=tokens, seed=seed)
    calibration = calibrate(moe.checkpoint, options, console)
    profiles = Profiles(output, moe, calibration, console)
    held_out = load_calibration(
        text, moe.checkpoint.tokenizer, moe.config, tokens=text_tokens, seed=seed
    )
    settings = {
        "model": moe.fingerprint,
        "text": held_out.sha256,
        "tokens": held_out.tokens,
        "seed": seed,
        "redistribution": redistribute,
    }
    most = [layer.experts_per_token for layer in moe.layers]
    sums = {name: int(parse_budget(name, most).activations) for name in budgets.split(",")}
    measured = [metric for metric in METRICS if metric in metrics.split(",")]
    if correction != "none":
        settings |= {"correction": correction, "calibration": [calibration.sha256, tokens]}
        correct = corrector(moe, calibration, redistribute, correction)
        losses = Losses(output, settings, moe, held_out.ids, correct)
        print(
            f"{held_out.tokens} held-out tokens, {calibration.tokens} calibration tokens; ", end=""
        )
        print(f"all plans run under {redistribute} with {correction} corrections.\n")
        print(in_place(measured, profiles, losses, sums, redistribute, correction))
        return
    losses = Losses(output, settings, moe, held_out.ids)
    random = np.random.default_rng(seed)
    sampled = {
        name: [random_plan(random, most, budget) for _ in range(plans // len(sums))]
        for name, budget in sums.items()
    }
    predictors = [predictor(profiles.measure(metric, redistribute)) for metric in measured]
    everything = [plan for each in sampled.values() for plan in each]
    chosen = {
        name: {each.name: solve_allocation(each.costs, budget) for each in predictors}
        | {"uniform k": uniform_allocation(most, budget)}
        for name, budget in sums.items()
    }
    with console.progress("Evaluating", len(everything), unit="plans") as progress:
        for plan in everything:
            losses.added(plan)
            progress.advance(1)
    count = Predictor("activations alone", [[-k for k in range(1, K + 1)] for K in most], 0)
    print(f"{len(everything)} random plans, {held_out.tokens} held-out tokens, ", end="")
    print(f"{calibration.tokens} calibration tokens, redistribution {redistribute}.\n")
    print(correlations([*predictors, count], sampled, losses))
    print("\nLoss added by the plan each chooses:\n")
    print(choices(chosen, sampled, losses))


@dataclass(frozen=True)
class Profiles:
    """Sensitivities on one text, in files beside the results."""

    output: Path
    moe: MoeModel
    calibration: CalibrationSet
    console: Console

    def measure(
        self,
        metric: Metric,
        redistribution: Redistribution = "none",
        correction: CorrectionMode = "none",
    ) -> SensitivityProfile:
        """Return a profile, measured if there is no file of it."""
        return measure_sensitivity(
            self.moe,
            self.calibration,
            metric=metric,
            redistribution=redistribution,
            correction=correction,
            path=self.output.with_suffix(f".{metric}.{redistribution}.{correction}.json"),
            console=self.console,
        )


def random_plan(random: np.random.Generator, most: Sequence[int], budget: int) -> list[int]:
    """Return a plan of exactly `budget` activations, some layers being given far more than others.

    Each plan draws how likely every layer is to get an expert, evenly among all such chances.
    """
    plan = [1] * len(most)
    chances = random.dirichlet([1.0] * len(most))
    while sum(plan) < budget:
        open_ = np.array([k < limit for k, limit in zip(plan, most, strict=True)])
        weights = (chances + 1e-9) * open_
        plan[random.choice(len(most), p=weights / weights.sum())] += 1
    return plan


def in_place(
    metrics: Sequence[Metric],
    profiles: Profiles,
    losses: Losses,
    sums: Mapping[str, int],
    redistribution: Redistribution,
    correction: CorrectionMode,
) -> str:
    """Return the loss added by plans from sensitivities measured in different ways, as a table."""
    lines = [
        f"| metric | measured with | {' | '.join(sums)} | seconds |",
        "|---|---|" + "---|" * (len(sums) + 1),
    ]
    ways: dict[tuple[Redistribution, CorrectionMode], str] = {("none", "none"): "neither"}
    ways.setdefault((redistribution, "none"), redistribution)
    both = correction if redistribution == "none" else f"{redistribution} + {correction}"
    ways[redistribution, correction] = both
    for metric in metrics:
        if metric == "data-free":  # on noise, where there is nothing to fit
            continue
        for (policy, mode), name in ways.items():
            each = predictor(profiles.measure(metric, policy, mode))
            plans = [solve_allocation(each.costs, budget) for budget in sums.values()]
            cells = [f"{losses.added(plan):+.4f}" for plan in plans]
            lines.append(f"| {metric} | {name} | {' | '.join(cells)} | {each.seconds:.1f} |")
    most = [layer.experts_per_token for layer in profiles.moe.layers]
    uniform = [uniform_allocation(most, budget) for budget in sums.values()]
    cells = [f"{losses.added(plan):+.4f}" for plan in uniform]
    lines.append(f"| uniform k |  | {' | '.join(cells)} |  |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
