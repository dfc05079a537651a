r"""What int8 and int4 cost in perplexity and divergence, by how weights are rounded, in one table.

Every rounding is compiled as alloc-compile would: weights, plan and corrections are its own, on the
calibration text of each seed. It is scored in PyTorch, which has the artifact's weights, on each of
the texts, against float32 under a plan of the same budget and seed.

    python examples/benchmarks/quality/rounding.py examples/tiny-moe \
        --text examples/tiny-moe/heldout.txt --text other.txt
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from default_plans import default_plans

from alloc_moe.compiler.calibration.windows import CalibrationSet, calibrate
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import CalibrationOptions, CorrectionMode
from alloc_moe.compiler.reference.experts import under_plan
from alloc_moe.compiler.rounding.calibrated import calibrated
from alloc_moe.compiler.rounding.formats import choose_formats
from alloc_moe.compiler.rounding.weights import quantized
from alloc_moe.runtime.console import Console

WINDOW = 512
ROUNDINGS = ("nearest", "gptq")


def rounded(model: str, dtype: str, rounding: str, block: int, text: CalibrationSet) -> MoeModel:
    """Return a model with weights so rounded."""
    moe = load_model(model)
    formats = choose_formats(moe.checkpoint, dtype, block=block)
    return calibrated(moe, formats, text) if rounding == "gptq" else quantized(moe, formats)


@contextlib.contextmanager
def planned(
    moe: MoeModel, budget: str, text: CalibrationSet, correction: CorrectionMode
) -> Iterator[None]:
    """Let a model run under its plan of a budget: the default one, if corrected by ``affine``."""
    if float(budget) == 1:
        yield
        return
    (made,) = default_plans(moe, text, (budget,), correction=correction)
    with under_plan(moe, made.plan, made.corrections):
        yield


@torch.inference_mode()
def said(moe: MoeModel, windows: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of what comes next [windows, window - 1, vocabulary]."""
    logits = (moe.model(input_ids=window[None]).logits[0, :-1] for window in windows)
    return torch.stack([each.log_softmax(-1) for each in logits])


def all_said(
    moe: MoeModel,
    cut: Sequence[torch.Tensor],
    budgets: Sequence[str],
    text: CalibrationSet,
    correction: CorrectionMode,
) -> Iterator[torch.Tensor]:
    """Yield what is said under budgets, planned on a text, on texts in turn."""
    for budget in budgets:
        with planned(moe, budget, text, correction):
            for windows in cut:
                yield said(moe, windows)


def costs(
    rounded: torch.Tensor, floats: torch.Tensor, windows: torch.Tensor
) -> tuple[float, float]:
    """Return the perplexity added, relative to the floats', and the divergence in nats."""
    after = windows[:, 1:, None]
    added = float((floats - rounded).gather(2, after).mean())
    pairs = zip(rounded, floats, strict=True)  # a window at a time: temporaries are large
    divergence = [float((known.exp() * (known - found)).sum(-1).mean()) for found, known in pairs]
    return float(np.expm1(added)), float(np.mean(divergence))


def beginning(text: CalibrationSet, tokens: int) -> CalibrationSet:
    """Return the first windows of a text, all if it has no more tokens."""
    if tokens >= text.ids.size:
        return text
    ids = text.ids[: max(1, tokens // text.sequence_length)]
    return dataclasses.replace(text, ids=ids, tokens=ids.size, further=None)


def windows_of(moe: MoeModel, text: Path, tokens: int) -> torch.Tensor:
    """Return the first tokens of a text [windows, tokens]."""
    tokenizer = moe.checkpoint.tokenizer
    ids = tokenizer(text.read_text("utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    window = min(WINDOW, moe.config.max_position_embeddings)
    return torch.tensor(ids[: min(tokens, len(ids)) // window * window]).view(-1, window)


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--text", "texts", multiple=True, required=True, type=click.Path(path_type=Path))
@click.option("--text-tokens", default=16384, show_default=True, help="Of each text.")
@click.option("--tokens", default=8192, show_default=True, help="Calibration tokens.")
@click.option("--seeds", default=3, show_default=True, help="Draws of calibration text.")
@click.option("--dtype", "dtypes", multiple=True, default=("int4", "int8"), show_default=True)
@click.option("--plan-tokens", default=8192, show_default=True, help="Of these, to plan on.")
@click.option("--correct", type=click.Choice(["affine", "none"]), default="affine")
@click.option("--block", default=128, show_default=True, help="Weights that share a scale.")
@click.option("--budget", "budgets", multiple=True, default=("1.0", "0.5"), show_default=True)
def main(
    models: tuple[str, ...],
    texts: tuple[Path, ...],
    text_tokens: int,
    tokens: int,
    seeds: int,
    dtypes: tuple[str, ...],
    plan_tokens: int,
    correct: CorrectionMode,
    block: int,
    budgets: tuple[str, ...],
) -> None:
    """Print what roundings add to the perplexity of MODELS, and how far they diverge.

    A cell is the mean over seeds, the least and the most; divergences are means in nats.
    """
    print("| model | type | budget | text | nearest | gptq | nearest, KL | gptq, KL |")
    print("|---|---|---|---|---|---|---|---|")
    for model in models:
        moe = load_model(model)
        cut = [windows_of(moe, text, text_tokens) for text in texts]
        found: dict[tuple[str, str], list[list[tuple[float, float]]]] = {}
        for seed in range(seeds):
            options = CalibrationOptions(tokens=tokens, seed=seed)
            text = calibrate(moe.checkpoint, options, Console(quiet=True))
            asked = cut, budgets, beginning(text, plan_tokens), correct
            floats = list(all_said(moe, *asked))
            for dtype, rounding in itertools.product(dtypes, ROUNDINGS):
                each = all_said(rounded(model, dtype, rounding, block, text), *asked)
                places = zip(each, floats, cut * len(budgets), strict=True)
                row = [costs(*place) for place in places]
                found.setdefault((dtype, rounding), []).append(row)
                print(f"{model} {seed} {dtype} {rounding}: {row}", file=sys.stderr, flush=True)
        for dtype in dtypes:
            by_rounding = [np.array(found[dtype, rounding]) for rounding in ROUNDINGS]
            for index, (budget, file) in enumerate(itertools.product(budgets, texts)):
                cells = [_spread(each[:, index, 0]) for each in by_rounding]
                cells += [f"{each[:, index, 1].mean():.4f}" for each in by_rounding]
                line = f"| {Path(model).name} | {dtype} | {budget} | {file.name} "
                print(f"{line}| {' | '.join(cells)} |", flush=True)


def _spread(added: Any) -> str:
    return f"{added.mean():+.2%} ({added.min():+.2%} to {added.max():+.2%})"


if __name__ == "__main__":
    main()
