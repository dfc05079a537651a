r"""What the calibration text matters: text of another kind, and how many tokens, in two tables.

Plans are the default's: one price, token sizes, a correction. Each is made on a draw of calibration
text and scored in PyTorch, against the full model, on a draw of held-out text. There are three
kinds of text: prose (the texts beside the model), documentation and code (Python's own, so that
figures are of one version of Python). One half of each kind is calibrated on, the other scored.

    python examples/benchmarks/quality/calibration.py examples/tiny-moe examples/tiny-qwen3-moe \
        --report examples/reports/calibration.csv

The file of runs grows with each plan, and what it has isn't measured again: an interrupted program
goes on, and more options add to the tables.
"""

from __future__ import annotations

import csv
import pydoc_data.topics
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from default_plans import default_plans

import alloc_moe.compiler
from alloc_moe.compiler.calibration.windows import CalibrationSet, load_calibration
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.records import Planned
from alloc_moe.compiler.reference.experts import under_plan

KINDS = ("prose", "documentation", "code")
BUILT_IN, MIXTURE = "built-in", "mixture"
BUILT_IN_FILE = Path(alloc_moe.compiler.__path__[0], "calibration", "built_in.txt")


@dataclass(frozen=True)
class Draw:
    """Calibration tokens: of a kind of text, of the built-in one, or of that and Python's texts."""

    calibration: str
    tokens: int
    seed: int

    @property
    def scored(self) -> Sequence[str]:
        """The texts that plans made on this draw are scored on."""
        return (self.calibration,) if self.calibration in KINDS else KINDS


@dataclass(frozen=True)
class Run:
    """What a plan gave on a text.

    ``full`` and ``loss`` are the full model's and the plan's in nats per token, ``divergence`` the
    mean KL(full model || plan), ``experts`` those run per token.
    """

    model: str
    calibration: str
    tokens: int
    seed: int
    budget: str
    text: str
    full: float
    loss: float
    divergence: float
    experts: float


def write_texts(model: Path, folder: Path) -> None:
    """Write the halves of every kind of text: KIND.calibration.txt and KIND.heldout.txt."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = [path.read_text("utf-8") for path in modules[::4]]
    for half, name in enumerate(("calibration", "heldout")):
        prose = (model / f"{name}.txt").read_text("utf-8")
        texts = (prose, "\n\n".join(topics[half::2]), "\n\n".join(code[half::2]))
        for kind, text in zip(KINDS, texts, strict=True):
            (folder / f"{kind}.{name}.txt").write_text(text, "utf-8")


class Bench:
    """A model with its texts, and what the full model makes of them."""

    def __init__(self, model: Path, folder: Path, text_tokens: int) -> None:
        self.moe, self._folder, self._text_tokens = load_model(str(model)), folder, text_tokens
        self._full: dict[str, tuple[torch.Tensor, list[torch.Tensor]]] = {}
        write_texts(model, folder)

    def draw(self, draw: Draw) -> CalibrationSet:
        """Return the tokens of a draw."""
        files = {kind: self._folder / f"{kind}.calibration.txt" for kind in KINDS}
        if draw.calibration != MIXTURE:
            return self._load(files.get(draw.calibration, BUILT_IN_FILE), draw.tokens, draw.seed)
        mixed = (BUILT_IN_FILE, files["documentation"], files["code"])
        parts = [self._load(path, draw.tokens // len(mixed), draw.seed) for path in mixed]
        # In turn, as the first windows alone decide the overlap.
        ids = np.stack([part.ids for part in parts], axis=1).reshape(-1, parts[0].sequence_length)
        return replace(parts[0], ids=ids, tokens=ids.size, name=MIXTURE)

    @torch.inference_mode()
    def score(self, planned: Planned, kind: str) -> dict[str, float]:
        """Return what a plan gives on a text: the last four fields of `Run`."""
        if kind not in self._full:
            ids = self._load(self._folder / f"{kind}.heldout.txt", self._text_tokens, 0).ids
            windows = torch.from_numpy(ids)
            self._full[kind] = windows, [self._log_probabilities(window) for window in windows]
        windows, full = self._full[kind]
        with under_plan(self.moe, planned.plan, planned.corrections) as seen:
            found = [self._log_probabilities(window) for window in windows]
        divergences = [
            F.kl_div(mine, other, reduction="batchmean", log_target=True)
            for mine, other in zip(found, full, strict=True)
        ]
        return {
            "full": _loss(full, windows),
            "loss": _loss(found, windows),
            "divergence": float(torch.stack(divergences).mean()),
            "experts": sum(seen.per_token),
        }

    def _load(self, path: Path, tokens: int, seed: int) -> CalibrationSet:
        checkpoint, config = self.moe.checkpoint, self.moe.config
        return load_calibration(path, checkpoint.tokenizer, config, tokens=tokens, seed=seed)

    def _log_probabilities(self, window: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.moe.model(input_ids=window[None]).logits[0]
        return logits.log_softmax(-1)  # [sequence, vocabulary]


def _loss(found: Sequence[torch.Tensor], windows: torch.Tensor) -> float:
    pairs = zip(found, windows, strict=True)
    return float(torch.stack([F.nll_loss(each[:-1], ids[1:]) for each, ids in pairs]).mean())


def read(path: Path) -> list[Run]:
    """Return the runs in a file; there may be no file."""
    if not path.exists():
        return []
    kinds: dict[str, Callable[[str], Any]] = {
        **dict.fromkeys(("tokens", "seed"), int),
        **dict.fromkeys(("full", "loss", "divergence", "experts"), float),
    }
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = [
            {k: kinds.get(k, str)(v) for k, v in row.items()} for row in csv.DictReader(file)
        ]
    return [Run(**row) for row in rows]


def measure(bench: Bench, model: str, draw: Draw, budgets: Sequence[str], report: Path) -> None:
    """Append the runs of a draw that the file lacks."""
    kept = read(report)
    done = {run.budget for run in kept if (run.model, *_of(run)) == (model, *_of(draw))}
    missing = [budget for budget in budgets if budget not in done]
    if not missing:
        return
    made = default_plans(bench.moe, bench.draw(draw), missing)
    for budget, planned in zip(missing, made, strict=True):
        for text in draw.scored:
            found: Any = bench.score(planned, text)
            kept.append(Run(model, *_of(draw), budget, text, **found))
        with report.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [each.name for each in fields(Run)], lineterminator="\n")
            writer.writeheader()
            for run in kept:
                cells = asdict(run).items()
                writer.writerow({k: f"{v:.6g}" if type(v) is float else v for k, v in cells})
        click.echo(f"{model}: {draw} at {budget}", err=True)


def _of(each: Draw | Run) -> tuple[str, int, int]:
    return each.calibration, each.tokens, each.seed


def table(runs: Sequence[Run], *by: str) -> str:
    """Return a row for the draws that are alike in these fields: means, ± half of the range."""
    names = [*by, "loss added", "divergence", "experts", "draws"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(by) + "---:|" * 4]
    for row in dict.fromkeys(tuple(getattr(run, name) for name in by) for run in runs):
        alike = [run for run in runs if tuple(getattr(run, name) for name in by) == row]
        cells = [
            *map(str, row),
            _spread([run.loss - run.full for run in alike], "+.4f"),
            _spread([run.divergence for run in alike], ".4f"),
            f"{np.mean([run.experts for run in alike]):.2f}",
            str(len(alike)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    return f"{np.mean(values):{form}} ±{(max(values) - min(values)) / 2:.4f}"


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--report", required=True, type=click.Path(path_type=Path), help="All runs (CSV).")
@click.option("--tokens", default=8192, show_default=True, help="To compare kinds of text with.")
@click.option("--curve", default="512,1024,2048,4096,8192,16384", show_default=True)
@click.option("--text-tokens", default=8192, show_default=True, help="To score on, of each text.")
@click.option("--seeds", default=3, show_default=True, help="Draws of calibration text.")
@click.option("--budget", "budgets", multiple=True, default=("0.5", "0.25"), show_default=True)
def main(
    models: tuple[Path, ...],
    report: Path,
    tokens: int,
    curve: str,
    text_tokens: int,
    seeds: int,
    budgets: tuple[str, ...],
) -> None:
    """Measure plans of MODELS on other calibration texts, and print two tables of all runs."""
    torch.set_num_threads(1)
    draws = [
        Draw(kind, tokens, seed) for kind in (BUILT_IN, MIXTURE, *KINDS) for seed in range(seeds)
    ]
    draws += [
        Draw(KINDS[0], int(count), seed) for count in curve.split(",") for seed in range(seeds)
    ]
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(model, Path(folder), text_tokens)
            for draw in draws:
                measure(bench, model.name, draw, budgets, report)
    order = (BUILT_IN, MIXTURE, *KINDS).index
    runs = sorted(
        read(report),
        key=lambda run: (
            *(run.model, -float(run.budget), order(run.text), order(run.calibration)),
            run.tokens,
        ),
    )
    compared = [run for run in runs if run.tokens == tokens]
    click.echo(table(compared, "model", "budget", "text", "calibration"))
    prose = [run for run in runs if run.calibration == KINDS[0]]
    click.echo(f"\n{table(prose, 'model', 'budget', 'tokens')}")


if __name__ == "__main__":
    main()
