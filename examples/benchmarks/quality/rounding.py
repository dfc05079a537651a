r"""What int8 and int4 cost in perplexity, by how weights are rounded, in one table.

Every rounding is compiled as alloc-compile would: weights, plan and corrections are its own, on the
calibration text of each seed. It is scored in PyTorch, which has the artifact's weights, on each of
the texts, against float32 under a plan of the same budget and seed.

    python examples/benchmarks/quality/rounding.py examples/tiny-moe \
        --text examples/tiny-moe/heldout.txt --text other.txt
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from alloc_moe.compiler.calibration.windows import CalibrationSet, calibrate
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.planning.allocation import parse_budget
from alloc_moe.compiler.planning.plan import make_planned
from alloc_moe.compiler.records import CalibrationOptions, PlanOptions
from alloc_moe.compiler.reference.experts import allocated
from alloc_moe.compiler.reference.policies import layer_parameters
from alloc_moe.compiler.rounding.calibrated import calibrated
from alloc_moe.compiler.rounding.formats import choose_formats
from alloc_moe.compiler.rounding.weights import quantized
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.runtime.console import Console

WINDOW = 512
ROUNDINGS = ("nearest", "gptq")


def rounded(model: str, dtype: str, rounding: str, block: int, text: CalibrationSet) -> MoeModel:
    """Return a model with weights so rounded."""
    moe = load_model(model)
    if dtype == "float32":
        return moe
    formats = choose_formats(moe.checkpoint, dtype, block=block)
    return calibrated(moe, formats, text) if rounding == "gptq" else quantized(moe, formats)


@contextlib.contextmanager
def planned(moe: MoeModel, budget: str, text: CalibrationSet) -> Iterator[None]:
    """Let a model run under its default plan of a budget."""
    if float(budget) == 1:
        yield
        return
    console = Console(quiet=True)
    profile = measure_sensitivity(
        moe, text, metric="fisher", redistribution="price", console=console
    )
    trained = [layer.experts_per_token for layer in moe.layers]
    made = make_planned(
        moe,
        text,
        parse_budget(budget, trained),
        PlanOptions(dial=False),
        profile=profile,
        console=console,
    )
    with allocated(
        moe.model,
        moe.layers,
        layer_parameters(made.plan),
        redistribution=made.plan.redistribution,
        weights=made.plan.weights,
        corrections=made.corrections,
    ):
        yield


@torch.inference_mode()
def loss(moe: MoeModel, windows: torch.Tensor) -> float:
    """Return the mean loss in nats per token."""
    sums = 0.0
    for window in windows:
        logits = moe.model(input_ids=window[None]).logits[0, :-1]
        sums += float(torch.nn.functional.cross_entropy(logits, window[1:]))
    return sums / len(windows)


def losses(moe: MoeModel, cut: Any, budgets: Sequence[str], text: CalibrationSet) -> list[float]:
    """Return the losses of budgets on texts, in turn."""
    found = []
    for budget in budgets:
        with planned(moe, budget, text):
            found += [loss(moe, windows) for windows in cut]
    return found


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
@click.option("--block", default=128, show_default=True, help="Weights that share a scale.")
@click.option("--budget", "budgets", multiple=True, default=("1.0", "0.5"), show_default=True)
def main(
    models: tuple[str, ...],
    texts: tuple[Path, ...],
    text_tokens: int,
    tokens: int,
    seeds: int,
    dtypes: tuple[str, ...],
    block: int,
    budgets: tuple[str, ...],
) -> None:
    """Print what roundings add to the perplexity of MODELS: the mean over seeds, least and most."""
    print("| model | type | budget | text | nearest | gptq |")
    print("|---|---|---|---|---|---|")
    for model in models:
        moe = load_model(model)
        cut = [windows_of(moe, text, text_tokens) for text in texts]
        drawn = [
            calibrate(
                moe.checkpoint, CalibrationOptions(tokens=tokens, seed=seed), Console(quiet=True)
            )
            for seed in range(seeds)
        ]
        floats = np.array([losses(moe, cut, budgets, text) for text in drawn])
        for dtype in dtypes:
            added = {}
            for rounding in ROUNDINGS:
                each = [
                    losses(rounded(model, dtype, rounding, block, text), cut, budgets, text)
                    for text in drawn
                ]
                added[rounding] = np.expm1(np.array(each) - floats)
            places = [(budget, text.name) for budget in budgets for text in texts]
            for index, (budget, text_name) in enumerate(places):
                cells = [_spread(added[rounding][:, index]) for rounding in ROUNDINGS]
                line = f"| {Path(model).name} | {dtype} | {budget} | {text_name} "
                print(f"{line}| {' | '.join(cells)} |", flush=True)


def _spread(added: Any) -> str:
    return f"{added.mean():+.2%} ({added.min():+.2%} to {added.max():+.2%})"


if __name__ == "__main__":
    main()
