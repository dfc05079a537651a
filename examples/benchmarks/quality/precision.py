r"""What int8 and int4 cost in quality, at an equal plan, in one table.

One plan per budget is made in float32, and compiled into an artifact of each precision, which
onnxruntime then runs on held-out text; the last column is the plan that --dtype makes itself, with
sensitivities and corrections measured on rounded weights. Weights are rounded as --dtype does by
default.

    python examples/benchmarks/quality/precision.py examples/tiny-moe \
        --text examples/tiny-moe/heldout.txt
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from default_plans import QUIET, default_plans
from numpy.typing import NDArray

from alloc_moe.compiler.calibration.windows import calibrate
from alloc_moe.compiler.choices import chosen_rounding
from alloc_moe.compiler.export.normalize import export_model
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.checkpoint import open_checkpoint
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.records import CalibrationOptions, DType, Planned
from alloc_moe.compiler.rounding.formats import BITS, choose_formats
from alloc_moe.compiler.rounding.stage import round_model
from alloc_moe.compiler.sweep.running import divergences
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.measure.evaluate import token_losses

WINDOW = 512
PRECISIONS: tuple[DType, ...] = ("float32", "int8", "int4")
Logits = list[NDArray[np.float32]]


class Compiler:
    """A model in one precision: what plans are measured on, and the exported graph."""

    def __init__(self, model: str, dtype: DType, *, tokens: int, block: int) -> None:
        moe = load_model(model)
        chosen = choose_formats(moe.checkpoint, dtype, block=block) if dtype in BITS else None
        self._text = calibrate(moe.checkpoint, CalibrationOptions(tokens=tokens), QUIET)
        rounding = chosen_rounding(None, dtype)
        self.moe: MoeModel = round_model(moe, chosen, rounding, self._text, QUIET)
        self._graph = export_model(self.moe, dtype=dtype)

    def plan(self, budget: str) -> Planned:
        """Return the default plan of a budget."""
        (planned,) = default_plans(self.moe, self._text, (budget,))
        return planned

    def logits(self, planned: Planned, windows: NDArray[np.int64]) -> Logits:
        """Return what the artifact of a plan says of each window."""
        model = specialize(
            self._graph,
            planned.plan,
            device="cpu",
            corrections=planned.corrections,
            quantization=self.moe.quantization,
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "artifact.onnx"
            package.save_graph(model, path)
            session = open_session(path, ep="cpu", stop_spinning=True)
            return [session.run(window[None]).logits[0] for window in windows]


def loss(logits: Logits, windows: NDArray[np.int64]) -> float:
    """Return the mean loss in nats per token."""
    pairs = zip(logits, windows, strict=True)
    return float(np.concatenate([token_losses(said[:-1], ids[1:]) for said, ids in pairs]).mean())


def divergence(full: Logits, other: Logits) -> float:
    """Return the mean of KL(full || other) in nats per token."""
    return float(np.mean([divergences(*pair).mean() for pair in zip(full, other, strict=True)]))


def rows(
    model: str, windows: NDArray[np.int64], budgets: Sequence[str], *, tokens: int, block: int
) -> list[str]:
    """Return the table's rows for one model."""
    compilers = {d: Compiler(model, d, tokens=tokens, block=block) for d in PRECISIONS}
    lines = []
    for budget in budgets:
        planned = compilers["float32"].plan(budget)
        found = {d: each.logits(planned, windows) for d, each in compilers.items()}
        reference = loss(found["float32"], windows)
        for dtype in PRECISIONS:
            mine = loss(found[dtype], windows)
            own = mine
            if dtype in BITS:
                own = loss(compilers[dtype].logits(compilers[dtype].plan(budget), windows), windows)
            lines.append(
                f"| {Path(model).name} | {budget} | {dtype} | {math.exp(mine):.3f} "
                f"| {math.expm1(mine - reference):+.2%} "
                f"| {divergence(found['float32'], found[dtype]):.5f} "
                f"| {math.expm1(own - reference):+.2%} |"
            )
    return lines


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--text", required=True, type=click.Path(path_type=Path), help="Held-out text.")
@click.option("--text-tokens", default=16384, show_default=True)
@click.option("--tokens", default=8192, show_default=True, help="Calibration tokens.")
@click.option("--block", default=128, show_default=True, help="Weights that share a scale.")
@click.option("--budget", "budgets", multiple=True, default=("1.0", "0.5"), show_default=True)
def main(
    models: tuple[str, ...],
    text: Path,
    text_tokens: int,
    tokens: int,
    block: int,
    budgets: tuple[str, ...],
) -> None:
    """Print perplexities and divergences of MODELS in each precision."""
    print("| model | budget | type | perplexity | against float32 | KL, nats | with its own plan |")
    print("|---|---|---|---|---|---|---|")
    for model in models:
        checkpoint = open_checkpoint(model)
        window = min(WINDOW, checkpoint.config.max_position_embeddings)
        tokenizer = checkpoint.tokenizer
        ids = tokenizer(text.read_text("utf-8"), add_special_tokens=False, verbose=False)
        length = min(text_tokens, len(ids["input_ids"])) // window * window
        windows = np.asarray(ids["input_ids"][:length], np.int64).reshape(-1, window)
        for line in rows(model, windows, budgets, tokens=tokens, block=block):
            print(line, flush=True)


if __name__ == "__main__":
    main()
