r"""Budgets on text of other kinds than the calibration text: experts run and loss, in one table.

Artifacts run windows of each text at their own price, at one that is set on that text, and with the
budget held: prompt pieces, and token by token as generation does. A window begins anew, so that its
second half shows what is held after 256 tokens.

    alloc-compile examples/tiny-moe --budget 0.5 -o out.onnx
    python examples/benchmarks/quality/held.py out.onnx --text examples/tiny-moe/heldout.txt \
        --report held.csv
"""

from __future__ import annotations

import argparse
import csv
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from alloc_moe.runtime import TextModel, load
from alloc_moe.runtime.execution.calls import Output
from alloc_moe.runtime.measure.evaluate import evaluate_artifact
from alloc_moe.runtime.text.hold import WINDOW, HeldBudget, executed_by_token, held_budget

TOKENS, POSITIONS = 512, 4
TEXTS = Path(__file__).parent / "texts"
KINDS = ("like it", "verse", "French", "code", "random tokens")
WAYS = ("static", "own", "held", "decoded")


@dataclass(frozen=True)
class Run:
    """What one way to set the price gave on one window of a text.

    ``experts`` are those run per token over those asked for, ``worst`` the largest share by which
    the mean of 256 tokens was off, ``loss`` in nats per token.
    """

    model: str
    text: str
    way: str
    position: int
    experts: float
    worst: float
    loss: float


def texts(model: TextModel, like: Path) -> dict[str, list[int]]:
    """Return the token ids of every text; ``like`` is one like the calibration text."""
    written = (
        like.read_text("utf-8")[:100_000],
        (TEXTS / "verse.txt").read_text("utf-8"),
        (TEXTS / "french.txt").read_text("utf-8"),
        inspect.getsource(argparse.ArgumentParser),
    )
    ids = [model.tokenizer.encode(text, add_special_tokens=False).ids for text in written]
    assert model.session.vocabulary is not None
    random = np.random.default_rng(0)
    ids.append(random.integers(0, model.session.vocabulary, POSITIONS * TOKENS).tolist())
    return dict(zip(KINDS, ids, strict=True))


def windows(ids: Sequence[int]) -> list[Sequence[int]]:
    """Return the windows of a text, one after the other."""
    return [ids[start : start + TOKENS] for start in range(0, POSITIONS * TOKENS, TOKENS)]


def measured(
    model: TextModel,
    ids: Sequence[int],
    held: HeldBudget,
    *,
    price: float | None = None,
    hold: bool = False,
    decode: bool = False,
) -> dict[str, float]:
    """Return what a window gives: the last three of `Run`."""
    counts: list[Any] = []

    def count(output: Output) -> None:
        counts.append(executed_by_token(output))

    found = evaluate_artifact(
        model.session,
        ids,
        window=len(ids),
        decode=decode,
        price=price,
        hold=held.begin() if hold else None,
        on_output=count,
    )
    ran = np.concatenate(counts) / held.activations
    means = np.convolve(ran, np.ones(WINDOW) / WINDOW, "valid")
    return {"experts": ran.mean(), "worst": np.abs(means - 1).max(), "loss": found.loss}


def own_price(model: TextModel, cut: Sequence[Sequence[int]], held: HeldBudget) -> float:
    """Return the price at which the mean over the windows of a text is the budget."""
    start = math.log(held.curve.price(held.activations))
    low, high = start - 1.5, start + 1.5
    for _ in range(10):
        middle = (low + high) / 2
        runs = [measured(model, ids, held, price=math.exp(middle)) for ids in cut]
        too_many = np.mean([run["experts"] for run in runs]) > 1
        low, high = (middle, high) if too_many else (low, middle)
    return math.exp(high)


def runs_of(name: str, model: TextModel, like: Path) -> list[Run]:
    """Return all runs of an artifact."""
    held = held_budget(model.session)
    runs = []
    for text, ids in texts(model, like).items():
        cut = windows(ids)
        own = own_price(model, cut, held)
        settings: Mapping[str, dict[str, Any]] = {
            "static": {},
            "own": {"price": own},
            "held": {"hold": True},
            "decoded": {"hold": True, "decode": True},
        }
        for way in WAYS:
            for position, window in enumerate(cut):
                found = measured(model, window, held, **settings[way])
                runs.append(Run(name, text, way, position, **found))
        click.echo(f"{name}: {text}", err=True)
    return runs


def table(runs: Sequence[Run]) -> str:
    """Return a row per model and text; experts are a mean over windows, losses a mean and range."""
    lines = [
        "| model | text | static | held | decoded | furthest window: held | decoded "
        "| loss: static | own price | held, over own | decoded, over own |",
        "|---|---|" + "---:|" * 9,
    ]
    for model, text in dict.fromkeys((run.model, run.text) for run in runs):
        of = {
            way: [run for run in runs if (run.model, run.text, run.way) == (model, text, way)]
            for way in WAYS
        }
        experts = [_mean(of[way], "experts") - 1 for way in ("static", "held", "decoded")]
        worst = [max(run.worst for run in of[way]) for way in ("held", "decoded")]
        losses = [_mean(of[way], "loss") for way in ("static", "own")]
        cells = [
            *(f"{value:+.1%}" for value in experts),
            *(f"{value:.1%}" for value in worst),
            *(f"{value:.4f}" for value in losses),
            *(_over(of[way], of["own"]) for way in ("held", "decoded")),
        ]
        lines.append(f"| {model} | {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(runs: Sequence[Run], field: str) -> float:
    return float(np.mean([getattr(run, field) for run in runs]))


def _over(runs: Sequence[Run], own: Sequence[Run]) -> str:
    """The loss over that at the text's own price, window by window."""
    over = [mine.loss - other.loss for mine, other in zip(runs, own, strict=True)]
    return f"{np.mean(over):+.4f} ({min(over):+.4f} to {max(over):+.4f})"


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--text", required=True, type=click.Path(path_type=Path), help="Held-out text.")
@click.option("--report", type=click.Path(path_type=Path), help="A table of all runs (CSV).")
@click.option("--threads", type=int)
def main(artifacts: tuple[Path, ...], text: Path, report: Path | None, threads: int | None) -> None:
    """Print what ARTIFACTS run and lose on texts of several kinds."""
    runs: list[Run] = []
    for path in artifacts:
        model = load(path, ep="cpu", threads=threads, count_activations=True)
        runs += runs_of(Path(model.session.plan.source).name, model, text)
    if report is not None:
        with report.open("w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, list(asdict(runs[0])), lineterminator="\n")
            rows.writeheader()
            for run in runs:
                cells = {
                    k: f"{v:.5f}" if isinstance(v, float) else v for k, v in asdict(run).items()
                }
                rows.writerow(cells)
    click.echo(table(runs))


if __name__ == "__main__":
    main()
