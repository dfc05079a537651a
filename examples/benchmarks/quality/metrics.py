"""How well each sensitivity metric predicts what a plan costs: the table in README.

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

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from scipy.stats import spearmanr

from alloc_moe.compiler.calibration.windows import CalibrationSet, calibrate, load_calibration
from alloc_moe.compiler.correction.fitting import Running, fit_corrections
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.planning.allocation import (
    parse_budget,
    solve_allocation,
    uniform_allocation,
)
from alloc_moe.compiler.records import (
    CalibrationOptions,
    Correction,
    CorrectionMode,
    Metric,
    Redistribution,
    SensitivityProfile,
)
from alloc_moe.compiler.reference.experts import allocated
from alloc_moe.compiler.reference.policies import LayerParameters
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.runtime.console import Console

Correct = Callable[[Sequence[int]], Sequence[Correction | None]]
METRICS: tuple[Metric, ...] = get_args(Metric)
_TOKENS_PER_BATCH = 2048  # one call; each of its windows shares its own activations


@dataclass(frozen=True)
class Predictor:
    """A metric, with what it predicts per layer and k."""

    name: str
    costs: Sequence[Sequence[float]]
    seconds: float

    def predict(self, plan: Sequence[int]) -> float:
        """Return the predicted cost of a plan."""
        return sum(row[k - 1] for row, k in zip(self.costs, plan, strict=True))


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


def corrector(
    moe: MoeModel,
    calibration: CalibrationSet,
    redistribution: Redistribution,
    mode: CorrectionMode,
) -> Correct:
    """Return what fits corrections to a plan, as a compile does."""
    ids = torch.from_numpy(calibration.ids)

    def fit(plan: Sequence[int]) -> Sequence[Correction | None]:
        running = Running([LayerParameters(k) for k in plan], redistribution, "keep")
        return fit_corrections(moe, ids, running, mode=mode).layers

    return fit


class Losses:
    """The loss that plans add to the full model's on a text, saved after each."""

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        moe: MoeModel,
        ids: np.ndarray[Any, Any],
        correct: Correct | None = None,
    ) -> None:
        """Continue the file at `path` if there is one; of other settings it ends the program."""
        self._path, self._moe, self._ids = path, moe, torch.from_numpy(ids)
        self._found: dict[str, Any] = {"settings": dict(settings), "losses": {}}
        if path.exists():
            self._found = json.loads(path.read_text())
            if self._found["settings"] != settings:
                sys.exit(f"{path} has the results of other settings. Delete it or name another.")
        self._redistribution: Redistribution = settings["redistribution"]
        self._correct = correct
        self._full = [layer.experts_per_token for layer in moe.layers]

    def added(self, plan: Sequence[int]) -> float:
        """Return the plan's loss less the full model's, in nats per token."""
        return self._loss(plan) - self._loss(self._full)

    def _loss(self, plan: Sequence[int]) -> float:
        name = " ".join(map(str, plan))
        if name not in self._found["losses"]:
            self._found["losses"][name] = self._measure(plan)
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._found, indent=1))
            partial.replace(self._path)
        found: float = self._found["losses"][name]
        return found

    def _measure(self, plan: Sequence[int]) -> float:
        total = 0.0
        parameters = [LayerParameters(k) for k in plan]
        corrections = None
        if self._correct is not None and list(plan) != self._full:
            corrections = self._correct(plan)
        with (
            torch.inference_mode(),
            allocated(
                self._moe.model,
                self._moe.layers,
                parameters,
                redistribution=self._redistribution,
                weights="keep",
                corrections=corrections,
            ) as seen,
        ):
            for ids in self._ids.split(max(1, _TOKENS_PER_BATCH // self._ids.shape[1])):
                logits = self._moe.model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
                losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
                total += losses.double().sum().item()
        if seen.per_token != list(plan):
            sys.exit(f"Executed {seen.per_token} experts per token, planned {plan}")
        return total / self._ids[:, 1:].numel()


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


def predictor(profile: SensitivityProfile) -> Predictor:
    """Return the costs of a complete profile."""
    return Predictor(profile.metric, [row or () for row in profile.costs], profile.seconds)


def correlations(
    predictors: Sequence[Predictor], sampled: Mapping[str, list[list[int]]], losses: Losses
) -> str:
    """Return Spearman's rank correlations of prediction and truth as a Markdown table."""
    lines = [
        f"| metric | all plans | {' | '.join(f'at {name}' for name in sampled)} | seconds |",
        "|---|" + "---|" * (len(sampled) + 2),
    ]
    everything = [plan for plans in sampled.values() for plan in plans]
    for each in predictors:
        found = [rank_correlation(each, plans, losses) for plans in (everything, *sampled.values())]
        cells = ["" if math.isnan(value) else f"{value:.3f}" for value in found]
        seconds = f"{each.seconds:.1f}" if each.seconds else ""
        lines.append(f"| {each.name} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def rank_correlation(each: Predictor, plans: Sequence[Sequence[int]], losses: Losses) -> float:
    """Return Spearman's rank correlation; NaN if all predictions are the same."""
    predicted = [each.predict(plan) for plan in plans]
    if len(set(predicted)) < 2:
        return math.nan
    return float(spearmanr(predicted, [losses.added(plan) for plan in plans]).statistic)


def choices(
    chosen: Mapping[str, Mapping[str, Sequence[int]]],
    sampled: Mapping[str, list[list[int]]],
    losses: Losses,
) -> str:
    """Return the loss added by each metric's plan, and by the best random one, as a table."""
    lines = [f"| plan by | {' | '.join(chosen)} |", "|---|" + "---|" * len(chosen)]
    for name in next(iter(chosen.values())):
        cells = [f"{losses.added(plans[name]):+.4f}" for plans in chosen.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    best = [f"{min(map(losses.added, plans)):+.4f}" for plans in sampled.values()]
    lines.append(f"| best random plan | {' | '.join(best)} |")
    return "\n".join(lines)


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
