"""alloc-run: texts continued with an artifact."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alloc_moe.runtime.commands.failures import Command
from alloc_moe.runtime.commands.numeric import FiniteRange, seed_type, tokens_type
from alloc_moe.runtime.commands.options import (
    budget_option,
    common_options,
    ep_option,
    examples,
    session_option,
    threads_option,
)
from alloc_moe.runtime.commands.texts import argument_text, read_text
from alloc_moe.runtime.console import Console, duration

# numpy, onnxruntime, tokenizers and rich load inside the functions, to keep --help quick.
if TYPE_CHECKING:
    from alloc_moe.runtime.execution.providers import Provider
    from alloc_moe.runtime.text.model import Completion


@click.command(
    cls=Command, epilog=examples("alloc-run out.onnx --prompt 'The committee' --max-new-tokens 64")
)
@click.argument("artifact", type=click.Path())
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    callback=lambda _context, _option, texts: tuple(map(argument_text, texts)),
    help="Text to continue. Repeatable.",
)
@click.option(
    "--prompt-file",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="File whose whole text is a prompt; - is stdin. Repeatable.",
)
@click.option("--max-new-tokens", type=tokens_type(), default=128, show_default=True)
@click.option(
    "--temperature",
    type=FiniteRange(0, 1000),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token.",
)
@click.option(
    "--top-p",
    type=FiniteRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that make up this probability.",
)
@click.option("--seed", type=seed_type, default=0, show_default=True, help="Seed of the draws.")
@budget_option
@ep_option
@threads_option
@session_option
@click.option(
    "--tokenizer", type=click.Path(), help="tokenizer.json, or its folder, if it isn't found."
)
@common_options
def run_command(
    console: Console,
    artifact: str,
    prompts: tuple[str, ...],
    files: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    budget: str | None,
    ep: Provider,
    threads: int | None,
    session_entries: dict[str, str],
    tokenizer: str | None,
) -> None:
    """Continue texts with ARTIFACT, an .onnx, .pt or .pt2 file or a bundle folder.

    One prompt is continued on stdout as the tokens come, several are worked on together and then
    printed one after the other. The prompt stands before its continuation.
    """
    from alloc_moe.runtime.text.model import load
    from alloc_moe.runtime.text.sampling import Sampling

    texts = [*prompts, *map(read_text, files)]
    if not texts:
        raise click.UsageError("Give a --prompt or a --prompt-file.")
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    start = time.perf_counter()
    model = load(
        artifact, tokenizer=tokenizer, ep=ep, threads=threads, more_options=session_entries
    )
    clock = _Clock(load=time.perf_counter() - start)
    alone = len(texts) == 1

    def on_token(row: int, piece: str) -> None:
        clock.token()
        if alone:
            console.stream((texts[0] if clock.tokens == 1 else "") + piece)

    clock.start()
    completions = model.generate(
        texts, max_new_tokens=max_new_tokens, sampling=sampling, budget=budget, on_token=on_token
    )
    printed = "" if alone else "\n\n".join(_labelled(completions))
    console.result(printed, _run_data(artifact, completions, clock))
    console.note(clock.report(completions))


class _Clock:
    """Times the loading, the first token and the rest."""

    def __init__(self, *, load: float) -> None:
        self.load = load
        self.tokens = 0
        self._start = self._first = self._last = 0.0

    def start(self) -> None:
        self._start = self._first = self._last = time.perf_counter()

    def token(self) -> None:
        self._last = time.perf_counter()
        if self.tokens == 0:
            self._first = self._last
        self.tokens += 1

    def seconds(self) -> dict[str, float]:
        return {
            "load": self.load,
            "prefill": self._first - self._start,
            "decode": self._last - self._first,
        }

    def report(self, completions: list[Completion]) -> str:
        """Return one line on prefill and decode; the first token of a row is prefill's."""
        seconds = self.seconds()
        prompt_tokens = sum(len(completion.prompt_ids) for completion in completions)
        decoded = sum(len(completion.ids) - 1 for completion in completions)
        rate = f" ({decoded / seconds['decode']:.1f}/s)" if seconds["decode"] > 0 else ""
        return (
            f"Loaded in {duration(seconds['load'])}; prefill: {prompt_tokens} tokens in "
            f"{seconds['prefill']:.2f} s; decode: {decoded} tokens in "
            f"{seconds['decode']:.2f} s{rate}."
        )


def _labelled(completions: list[Completion]) -> list[str]:
    count = len(completions)
    return [
        f"[{number}/{count}] {completion.prompt}{completion.text}"
        for number, completion in enumerate(completions, 1)
    ]


def _run_data(artifact: str, completions: list[Completion], clock: _Clock) -> dict[str, Any]:
    return {
        "artifact": str(Path(artifact)),
        "completions": [dataclasses.asdict(completion) for completion in completions],
        "seconds": clock.seconds(),
    }
