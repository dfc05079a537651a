"""alloc-eval: the loss of an artifact or original model on a text, and the experts it executed.

Artifacts need the base install only; torch is loaded for original models.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import click

from alloc_moe.runtime.commands.failures import Command
from alloc_moe.runtime.commands.numeric import MOST_TEXT, WholeFrom, tokens_type
from alloc_moe.runtime.commands.options import (
    budget_option,
    common_options,
    ep_option,
    examples,
    hold_option,
    threads_option,
    tokenizer_option,
)
from alloc_moe.runtime.console import Console

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from alloc_moe.runtime.artifact.plan import AllocationPlan
    from alloc_moe.runtime.execution.providers import Provider
    from alloc_moe.runtime.measure.evaluate import Evaluation
    from alloc_moe.runtime.text.chat import ChatTemplate
    from alloc_moe.runtime.text.reading import Encode, Encoded


@click.command(
    cls=Command,
    epilog=examples(
        "alloc-eval out.onnx --text examples/tiny-moe/heldout.txt",
        "alloc-eval examples/tiny-moe --text examples/tiny-moe/heldout.txt",
    ),
)
@click.argument("target", metavar="ARTIFACT_OR_MODEL")
@click.option(
    "--text",
    "text_file",
    required=True,
    type=click.Path(path_type=Path),
    help="UTF-8 text, or conversations (.jsonl).",
)
@click.option(
    "--window",
    type=tokens_type(2),
    help="Tokens per call. Default: the model's context, 512 at most.",
)
@click.option(
    "--stride", type=tokens_type(), help="Tokens from window to window. Default: half a window."
)
@click.option("--tokens", type=WholeFrom(2, MOST_TEXT), help="Take the text's first tokens only.")
@click.option("--decode", is_flag=True, help="Artifacts: one token per call, as generation does.")
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    help="Models: run under this plan (allocation.json, or an artifact) in PyTorch.",
)
@budget_option
@hold_option
@ep_option
@threads_option
@tokenizer_option
@click.option(
    "--trust-remote-code", is_flag=True, help="Models: run Python code of the checkpoint."
)
@common_options
def eval_command(
    console: Console,
    target: str,
    text_file: Path,
    window: int | None,
    stride: int | None,
    tokens: int | None,
    decode: bool,
    plan_file: Path | None,
    budget: str | None,
    hold: bool,
    ep: Provider,
    threads: int | None,
    tokenizer: str | None,
    trust_remote_code: bool,
) -> None:
    """Measure perplexity and executed experts of ARTIFACT_OR_MODEL on a text.

    The text is one sequence, taken in windows; each token but the first is scored once, with a
    context of at least window - stride tokens. A window is one call with a batch of one.
    """
    from alloc_moe.runtime.execution.finite import check_finite

    _open(text_file).close()  # what can't be opened is told before a model is loaded
    settings = _Settings(window, stride, tokens, decode, budget, hold)
    if _is_artifact(Path(target)):
        if plan_file is not None:
            raise click.UsageError("--plan is for original models; an artifact has its own plan.")
        evaluation, plan = _evaluate_artifact(
            console, target, text_file, settings, ep=ep, threads=threads, tokenizer=tokenizer
        )
    else:
        if decode or hold:
            raise click.UsageError(f"{'--decode' if decode else '--hold'} is for artifacts.")
        if budget is not None and plan_file is None:
            raise click.UsageError("--budget is for artifacts, and for models with a --plan.")
        evaluation, plan = _evaluate_model(
            console, target, text_file, settings, plan_file, trust_remote_code=trust_remote_code
        )
    check_finite(evaluation.loss, f"{target} computed losses")
    price = settings.price(plan)
    data = {**_data(target, evaluation, plan), "budget": budget, "price": price, "hold": hold}
    console.result(_summary(evaluation, plan, settings), data)


@dataclasses.dataclass(frozen=True)
class _Settings:
    window: int | None
    stride: int | None
    tokens: int | None
    decode: bool
    budget: str | None
    hold: bool

    def price(self, plan: AllocationPlan) -> float | None:
        """The price at which to run under a plan; None is the plan's own, or what a hold sets."""
        from alloc_moe.runtime.artifact.dial import price_of

        return None if self.hold or self.budget is None else price_of(plan, self.budget)


def _is_artifact(path: Path) -> bool:
    from alloc_moe.runtime.artifact.plan import MODEL_FILE
    from alloc_moe.runtime.artifact.torch_file import EXPORT, SCRIPT

    return path.suffix in (".onnx", SCRIPT, EXPORT) or (path / MODEL_FILE).is_file()


def _read(
    path: Path, encode: Encode, template: ChatTemplate | None, tokens: int | None
) -> NDArray[np.intc]:
    """Return the ids of a text's first tokens, of all if that isn't said."""
    from alloc_moe.runtime.errors import AllocMoeError
    from alloc_moe.runtime.text.reading import MOST_BYTES, TextError, read_ids

    with _open(path, template) as file:
        try:
            text = read_ids(file, encode, most_tokens=tokens, newlines=True)
        except TextError as error:
            raise AllocMoeError(f"The text {path} {error}") from error
    if text.cut:
        raise AllocMoeError(
            f"The text {path} is longer than {MOST_BYTES >> 20} MiB. "
            "Give --tokens, or a part of it."
        )
    return text.ids


def _open(path: Path, template: ChatTemplate | None = None) -> BinaryIO:
    from alloc_moe.runtime.errors import AllocMoeError
    from alloc_moe.runtime.text.reading import TextError
    from alloc_moe.runtime.text.sources import open_text

    try:
        return open_text(path, template)
    except OSError as error:
        raise AllocMoeError(
            f"The text {path} can't be read: {error.strerror}. Give a UTF-8 file."
        ) from error
    except TextError as error:
        raise AllocMoeError(f"The text {path} {error}") from error


def _evaluate_artifact(
    console: Console,
    target: str,
    text_file: Path,
    settings: _Settings,
    *,
    ep: Provider,
    threads: int | None,
    tokenizer: str | None,
) -> tuple[Evaluation, AllocationPlan]:
    from alloc_moe.runtime.execution.session import open_session
    from alloc_moe.runtime.measure.evaluate import evaluate_artifact
    from alloc_moe.runtime.text.chat import load_chat_template
    from alloc_moe.runtime.text.hold import held_budget
    from alloc_moe.runtime.text.sources import has_objects
    from alloc_moe.runtime.text.tokenizer import load_tokenizer

    session = open_session(target, ep=ep, threads=threads, count_activations=True)
    hold = held_budget(session, settings.budget).begin() if settings.hold else None
    found = load_tokenizer(session.files, tokenizer)

    def encode(text: str) -> Encoded:
        encoded = found.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    template = None
    if has_objects(text_file):
        template = load_chat_template(session.files, tokenizer=tokenizer)
    ids = _read(text_file, encode, template, settings.tokens)
    with console.progress("Evaluating", len(ids) - 1, unit="tokens") as progress:
        evaluation = evaluate_artifact(
            session,
            ids,
            window=settings.window,
            stride=settings.stride,
            decode=settings.decode,
            price=settings.price(session.plan),
            hold=hold,
            on_scored=progress.advance,
        )
    return evaluation, session.plan


def _evaluate_model(
    console: Console,
    target: str,
    text_file: Path,
    settings: _Settings,
    plan_file: Path | None,
    *,
    trust_remote_code: bool,
) -> tuple[Evaluation, AllocationPlan]:
    from alloc_moe.compiler.errors import need_compile_extra

    need_compile_extra()
    import torch

    from alloc_moe.compiler.calibration.windows import chat_template, encoder
    from alloc_moe.compiler.model.loading import load_model
    from alloc_moe.compiler.reference.experts import allocated
    from alloc_moe.compiler.reference.plans import read_plan, trained_plan
    from alloc_moe.compiler.reference.policies import layer_parameters
    from alloc_moe.runtime.measure.evaluate import default_window, evaluate

    moe = load_model(target, console, trust_remote_code=trust_remote_code)
    plan = (
        trained_plan(moe.checkpoint) if plan_file is None else read_plan(plan_file, moe.checkpoint)
    )
    tokenizer = moe.checkpoint.tokenizer
    ids = _read(text_file, encoder(tokenizer), chat_template(tokenizer), settings.tokens)
    context = getattr(moe.config.get_text_config(), "max_position_embeddings", None)
    window = default_window(context) if settings.window is None else settings.window
    stride = max(window // 2, 1) if settings.stride is None else settings.stride

    def logits_of(tokens: NDArray[np.int64]) -> NDArray[np.floating]:
        logits = moe.model(input_ids=torch.from_numpy(tokens), use_cache=False).logits
        return cast("NDArray[np.floating]", logits.float().numpy())

    with (
        console.progress("Evaluating", len(ids) - 1, unit="tokens") as progress,
        torch.inference_mode(),
        allocated(
            moe.model,
            moe.layers,
            layer_parameters(plan, settings.price(plan)),
            redistribution=plan.redistribution,  # type: ignore[arg-type]
            weights=plan.weights,  # type: ignore[arg-type]
        ) as activations,
    ):
        evaluation = evaluate(
            logits_of, ids, window=window, stride=stride, on_scored=progress.advance
        )
    return dataclasses.replace(evaluation, activations=tuple(activations.executed)), plan


def _summary(evaluation: Evaluation, plan: AllocationPlan, settings: _Settings) -> str:
    budget = settings.budget
    planned = f"plan: {plan.budget.activations:.6g}" if budget is None else f"budget: {budget}"
    planned += ", held" if settings.hold else ""
    ks = " ".join(f"{layer.k:<6.4g}" for layer in plan.layers).rstrip()
    executed = evaluation.activations_per_token or ()
    return (
        f"Perplexity {evaluation.perplexity:.4f} (loss {evaluation.loss:.6f} nats per token) on "
        f"{evaluation.tokens_scored} tokens, windows of {evaluation.window} "
        f"every {evaluation.stride}\n"
        f"Experts executed per token: {sum(executed):.4f} of {plan.budget.original} "
        f"({planned})\n"
        f"By layer: {' '.join(f'{mean:.4f}' for mean in executed)}"
        + (f"\nPlan:     {ks}" if budget is None else "")
    )


def _data(target: str, evaluation: Evaluation, plan: AllocationPlan) -> dict[str, Any]:
    return {
        "target": target,
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "tokens_scored": evaluation.tokens_scored,
        "tokens_run": evaluation.tokens_run,
        "window": evaluation.window,
        "stride": evaluation.stride,
        "activations": evaluation.activations,
        "activations_per_token": evaluation.activations_per_token,
        "plan": json.loads(plan.to_json()),
    }


if __name__ == "__main__":
    eval_command()
