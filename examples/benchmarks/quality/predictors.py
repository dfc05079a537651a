"""What metrics predict that plans cost, and how well: two tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plan_losses import Losses
from scipy.stats import spearmanr

from alloc_moe.compiler.records import SensitivityProfile


@dataclass(frozen=True)
class Predictor:
    """A metric, with what it predicts per layer and k."""

    name: str
    costs: Sequence[Sequence[float]]
    seconds: float

    def predict(self, plan: Sequence[int]) -> float:
        """Return the predicted cost of a plan."""
        return sum(row[k - 1] for row, k in zip(self.costs, plan, strict=True))


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
