r"""What plans of equal bytes add to the loss: one width of experts, or both, in one table.

Every plan is made as by --target-bytes: a token reads so much of all weights at most. A cell is the
divergence from the unrounded full model on held-out text (KL, nats per token), which has the loss
added with less noise: the mean over seeds of the calibration text, the least and the most. Plans
are scored in PyTorch, which has the artifact's weights.

    python examples/benchmarks/quality/frontier.py examples/tiny-moe --targets 1.2MB,1.6MB
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rounding import windows_of

from alloc_moe.compiler.calibration.windows import CalibrationSet, calibrate
from alloc_moe.compiler.choices import byte_count
from alloc_moe.compiler.errors import BudgetError
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.planning.goals.planner import Planner
from alloc_moe.compiler.planning.goals.search import meet_goal, reachable
from alloc_moe.compiler.planning.goals.traffic import WeightsRead, weights_read
from alloc_moe.compiler.records import (
    CalibrationOptions,
    DType,
    Goal,
    Planned,
    PlanOptions,
    Redistribution,
    Rounding,
)
from alloc_moe.compiler.reference.experts import under_plan
from alloc_moe.compiler.rounding.formats import choose_formats, mixed_formats
from alloc_moe.compiler.rounding.stage import round_model
from alloc_moe.compiler.rounding.weights import with_float_experts
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.runtime.console import Console

QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Way:
    """What bytes are spent on."""

    name: str
    dtype: DType
    rounding: Rounding
    redistribution: Redistribution = "threshold"
    mixed: bool = False


WAYS = (
    Way("int4, threshold", "int4", "gptq"),
    Way("mixed, other weights int4", "int4", "gptq", mixed=True),
    Way("int4, price", "int4", "gptq", "price"),
    Way("int8, threshold", "int8", "nearest"),
    Way("int8, price", "int8", "nearest", "price"),
    Way("mixed, other weights int8", "int8", "gptq", mixed=True),
)


def making(model: str, way: Way, text: CalibrationSet) -> tuple[Planner, WeightsRead]:
    """Return what a way's plans are made from, and what a token reads."""
    moe = load_model(model)
    chosen = choose_formats(moe.checkpoint, way.dtype)
    formats = mixed_formats(chosen) if way.mixed else ()
    reading = weights_read(moe.checkpoint, dtype=way.dtype, quantization=chosen, formats=formats)
    moe = round_model(moe, chosen, way.rounding, text, QUIET, widths=formats)
    profile = measure_sensitivity(
        moe,
        text,
        metric="fisher",
        redistribution=way.redistribution,
        correction="affine",
        formats=formats,
    )
    options = PlanOptions(way.redistribution, dial=False)
    return Planner(moe, text, options, profile, formats, None, QUIET), reading


@torch.inference_mode()
def said(moe: MoeModel, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the logarithms of what a model expects of each window [tokens, vocabulary]."""
    for window in windows:
        yield moe.model(input_ids=window[None]).logits[0].log_softmax(-1)


def divergence(
    moe: MoeModel, planned: Planned, windows: torch.Tensor, full: list[torch.Tensor]
) -> float:
    """Return KL(full || plan) in nats per token."""
    with under_plan(moe, planned.plan, planned.corrections):
        pairs = zip(full, said(moe, windows), strict=True)
        sums = [float((before.exp() * (before - now)).sum(-1).mean()) for before, now in pairs]
    return sum(sums) / len(sums)


def divergences(
    model: str,
    way: Way,
    text: CalibrationSet,
    targets: Sequence[str],
    windows: torch.Tensor,
    full: list[torch.Tensor],
) -> list[float]:
    """Return the divergence of a way at each target; infinite where it has no plan so small."""
    given, reading = making(model, way, text)
    found = []
    for target in targets:
        goal = Goal("bytes", byte_count("target", target))
        try:
            reading = reachable(goal, reading, needs_token_sizes=False)
            moe, planned = meet_goal(goal, given, reading, 0.0)
        except BudgetError:
            found.append(math.inf)
            continue
        found.append(divergence(moe, planned, windows, full))
        click.echo(f"{way.name}, seed {text.seed}, {target}: {found[-1]:.5f}", err=True)
        if way.mixed:
            given = dataclasses.replace(given, moe=with_float_experts(moe))
    return found


@click.command()
@click.argument("model")
@click.option("--targets", required=True, help="Bytes that a token reads: 0.7MB,0.9MB.")
@click.option("--text-tokens", default=16384, show_default=True, help="Of heldout.txt.")
@click.option("--tokens", default=8192, show_default=True, help="Calibration tokens.")
@click.option("--seed", "seeds", multiple=True, default=(0, 1, 2), show_default=True)
def main(model: str, targets: str, text_tokens: int, tokens: int, seeds: tuple[int, ...]) -> None:
    """Print how far plans of each way diverge from MODEL at equal bytes."""
    moe = load_model(model)
    windows = windows_of(moe, Path(model) / "heldout.txt", text_tokens)
    full = list(said(moe, windows))
    texts = [
        calibrate(moe.checkpoint, CalibrationOptions(tokens=tokens, seed=seed), QUIET)
        for seed in seeds
    ]
    wanted = targets.split(",")
    print(f"| {Path(model).name} | {' | '.join(wanted)} |\n|---|{'---:|' * len(wanted)}")
    for way in WAYS:
        each = [divergences(model, way, text, wanted, windows, full) for text in texts]
        print(f"| {way.name} | {' | '.join(map(_spread, zip(*each, strict=True)))} |", flush=True)


def _spread(found: Sequence[float]) -> str:
    mean = sum(found) / len(found)
    return f"{mean:.4f} ({min(found):.4f} to {max(found):.4f})" if mean < math.inf else "-"


if __name__ == "__main__":
    main()
