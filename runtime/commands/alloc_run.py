"""alloc-run: texts continued with an artifact."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alloc_moe.runtime.commands.failures import Command
from alloc_moe.runtime.commands.numeric import FiniteFrom, FiniteRange, seed_type, tokens_type
from alloc_moe.runtime.commands.options import (
    budget_option,
    chat_template_option,
    common_options,
    ep_option,
    examples,
    hold_option,
    session_option,
    threads_option,
    tokenizer_option,
)
from alloc_moe.runtime.commands.texts import argument_text, read_text
from alloc_moe.runtime.console import Console, duration

# numpy, onnxruntime, tokenizers and rich load inside the functions, to keep --help quick.
if TYPE_CHECKING:
    from alloc_moe.runtime.execution.providers import Provider
    from alloc_moe.runtime.text.model import Completion


def _texts(_context: object, _option: object, texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(argument_text, texts))


def _optional_text(_context: object, _option: object, text: str | None) -> str | None:
    return None if text is None else argument_text(text)


@click.command(
    cls=Command,
    epilog=examples(
        "alloc-run out.onnx --prompt 'The committee' --max-new-tokens 64",
        "alloc-run bundle/ --chat --temperature 0.7 --min-p 0.05",
    ),
)
@click.argument("artifact", type=click.Path())
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    callback=_texts,
    help="Text to continue. Repeatable.",
)
@click.option(
    "--prompt-file",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="File whose whole text is a prompt; - is stdin. Repeatable.",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Talk with the model: lines from stdin are messages. /help says what else they can be.",
)
@click.option(
    "--system", callback=_optional_text, help="With --chat: what to tell the model beforehand."
)
@chat_template_option
@click.option("--max-new-tokens", type=tokens_type(), default=128, show_default=True)
@click.option(
    "--temperature",
    type=FiniteFrom(0, 1000),
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
@click.option(
    "--min-p",
    type=FiniteRange(0, 1),
    default=0.0,
    show_default=True,
    help="Leave out tokens less likely than this share of the likeliest one's probability.",
)
@click.option(
    "--repetition-penalty",
    type=FiniteFrom(0, 1000, above=True),
    default=1.0,
    show_default=True,
    help="Above 1, what was said before becomes less likely.",
)
@click.option(
    "--stop",
    "stop_strings",
    multiple=True,
    callback=_texts,
    help="Text that ends a continuation, and isn't part of it. Repeatable.",
)
@click.option("--seed", type=seed_type, default=0, show_default=True, help="Seed of the draws.")
@budget_option
@hold_option
@ep_option
@threads_option
@session_option
@tokenizer_option
@common_options
def run_command(
    console: Console,
    artifact: str,
    prompts: tuple[str, ...],
    files: tuple[str, ...],
    chat: bool,
    system: str | None,
    chat_template: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    stop_strings: tuple[str, ...],
    seed: int,
    budget: str | None,
    hold: bool,
    ep: Provider,
    threads: int | None,
    session_entries: dict[str, str],
    tokenizer: str | None,
) -> None:
    """Continue texts with ARTIFACT (.onnx, .pt, .pt2 or a bundle folder), or talk with it.

    One prompt is continued on stdout as the tokens come, several are worked on together and then
    printed one after the other. The prompt stands before its continuation.

    With --chat every line from stdin is a message, answered in the words of the model's chat
    template.
    """
    from alloc_moe.runtime.commands.chat import Chat, typed_lines
    from alloc_moe.runtime.execution.providers import tries_cuda
    from alloc_moe.runtime.text.model import load
    from alloc_moe.runtime.text.sampling import Sampling

    if chat and (prompts or files or console.json_output):
        raise click.UsageError(
            "--chat reads messages from stdin and prints answers as they come: leave out --prompt, "
            "--prompt-file and --json."
        )
    if not chat and (system is not None or not (prompts or files)):
        raise click.UsageError("Give a --prompt or a --prompt-file, or --chat.")
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    texts = [*prompts, *map(read_text, files)]
    start = time.perf_counter()
    model = load(
        artifact,
        tokenizer=tokenizer,
        chat_template=chat_template,
        ep=ep,
        threads=threads,
        # On a GPU counting would leave our kernels out.
        count_activations=hold or (chat and not tries_cuda(ep)),
        more_options=session_entries,
    )
    clock = _Clock(load=time.perf_counter() - start)
    settings: dict[str, Any] = {"sampling": sampling, "stop_strings": stop_strings, "hold": hold}
    if chat:
        talk = Chat(
            model,
            console,
            max_new_tokens=max_new_tokens,
            system=system,
            budget=budget,
            settings=settings,
        )
        talk.run(typed_lines())
        return
    alone = len(texts) == 1

    def on_token(row: int, piece: str) -> None:
        clock.token()
        if alone:
            console.stream((texts[0] if clock.tokens == 1 else "") + piece)

    clock.start()
    completions = model.generate(
        texts, max_new_tokens=max_new_tokens, budget=budget, on_token=on_token, **settings
    )
    printed = "" if alone else "\n\n".join(_labelled(completions))
    console.result(printed, _run_data(artifact, completions, clock))
    console.note(clock.report(completions))
    if hold:
        console.note(_held(completions))


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


def _held(completions: list[Completion]) -> str:
    """Return one line on the experts that ran for each prompt and its continuation."""
    means = [f"{completion.experts_per_token:.4g}" for completion in completions]
    return f"Experts executed per token: {', '.join(means)}."


def _run_data(artifact: str, completions: list[Completion], clock: _Clock) -> dict[str, Any]:
    return {
        "artifact": str(Path(artifact)),
        "completions": [dataclasses.asdict(completion) for completion in completions],
        "seconds": clock.seconds(),
    }
