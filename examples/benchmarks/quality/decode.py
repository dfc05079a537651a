r"""Single-stream decode and the dial: losses that no pool can help, in two tables.

Artifacts are compiled at half of their activations and run on held-out text with one token per
call, teacher-forced, as generation does; then the default artifact is turned to other budgets and
compared with artifacts compiled for those.

    python examples/benchmarks/quality/decode.py examples/tiny-moe \
        --text examples/tiny-moe/heldout.txt
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from alloc_moe.compiler import compile
from alloc_moe.compiler.model.checkpoint import open_checkpoint
from alloc_moe.compiler.sweep.methods import Method, parse_method
from alloc_moe.runtime import open_session, price_of
from alloc_moe.runtime.execution.calls import Session
from alloc_moe.runtime.measure.evaluate import Evaluation, evaluate_artifact

DECODED = ("uniform", "batch", "threshold", "price", "default")
WINDOW, STRIDE = 512, 448
BUDGETS = ("0.25", "0.375", "0.5", "0.625", "0.75", "1.0")


class Compiler:
    """A model, and a folder for its artifacts and the profiles that they share."""

    def __init__(self, model: str, *, tokens: int, folder: Path) -> None:
        self._model, self._tokens, self._folder = model, tokens, folder

    def artifact(self, method: Method, budget: str) -> Session:
        """Return the artifact of a method and a budget, loaded."""
        measured = f"{method.metric}-{method.redistribution}"
        sizes = "-token-sizes" if method.token_sizes else ""
        path = self._folder / f"{measured}-{method.correction}{sizes}-{budget}.onnx"
        if not path.exists():
            compile(
                self._model,
                budget=budget,
                output=path,
                tokens=self._tokens,
                profile=self._folder / f"{measured}.json",
                allocation="uniform" if method.metric is None else "sensitivity",
                redistribute=method.redistribution,
                correct=method.correction,
                token_sizes=method.token_sizes,
            )
        return open_session(path, ep="cpu", count_activations=True, stop_spinning=True)


def row(name: str, found: Evaluation, full: Evaluation) -> str:
    """Return a Markdown row: added loss and measured activations."""
    activations = sum(found.activations_per_token or ())
    return f"| {name} | {found.loss - full.loss:+.4f} | {activations:.2f} |"


def decode_table(compiler: Compiler, ids: Sequence[int]) -> None:
    """Print the loss that each method adds at half the activations, one token per call."""

    def decoded(method: str, budget: str) -> Evaluation:
        session = compiler.artifact(parse_method(method), budget)
        return evaluate_artifact(session, ids, window=WINDOW, stride=STRIDE, decode=True)

    full = decoded("uniform", "1.0")
    print(f"One token per call, {full.tokens_scored} tokens; full model: loss {full.loss:.4f}")
    print("\n| at half the activations | added loss | activations |\n|---|---|---|")
    for name in DECODED:
        print(row(parse_method(name).name, decoded(name, "0.5"), full), flush=True)


def dial_table(compiler: Compiler, ids: Sequence[int]) -> None:
    """Print the loss at each budget of one artifact, beside artifacts compiled for that budget."""
    full = evaluate_artifact(
        compiler.artifact(parse_method("uniform"), "1.0"), ids, window=WINDOW, stride=STRIDE
    )
    corrected = compiler.artifact(parse_method("default"), "0.5")
    plain = compiler.artifact(parse_method("price"), "1.0")
    print("\n| budget | compiled for it | dialled, corrected at 0.5 | dialled, uncorrected |")
    print("|---|---|---|---|")
    for budget in BUDGETS:
        cells = [
            evaluate_artifact(
                compiler.artifact(parse_method("default"), budget),
                ids,
                window=WINDOW,
                stride=STRIDE,
            )
        ]
        for session in (corrected, plain):
            price = price_of(session.plan, budget)
            cells.append(evaluate_artifact(session, ids, window=WINDOW, stride=STRIDE, price=price))
        texts = (
            f"{cell.loss - full.loss:+.4f} ({sum(cell.activations_per_token or ()):.1f})"
            for cell in cells
        )
        print(f"| {budget} | " + " | ".join(texts) + " |", flush=True)


@click.command()
@click.argument("model")
@click.option("--text", required=True, type=click.Path(path_type=Path), help="Held-out text.")
@click.option("--decode-tokens", default=4096, show_default=True)
@click.option("--dial-tokens", default=16384, show_default=True)
@click.option("--tokens", default=8192, show_default=True, help="Calibration tokens.")
def main(model: str, text: Path, decode_tokens: int, dial_tokens: int, tokens: int) -> None:
    """Print both tables for MODEL."""
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(model, tokens=tokens, folder=Path(folder))
        tokenizer = open_checkpoint(model, trust_remote_code=False).tokenizer
        read = tokenizer(text.read_text("utf-8"), add_special_tokens=False, verbose=False)
        ids = read["input_ids"]
        decode_table(compiler, ids[:decode_tokens])
        dial_table(compiler, ids[:dial_tokens])


if __name__ == "__main__":
    main()
