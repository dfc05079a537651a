"""The commands that work on artifacts: alloc-run, alloc-inspect, alloc-bench."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alloc_moe.runtime.command import Console, common_options, duration, examples

# numpy, onnxruntime, tokenizers and rich load inside the functions, to keep --help quick.
if TYPE_CHECKING:
    from alloc_moe.runtime.bench import Measurement, Speed
    from alloc_moe.runtime.providers import Provider
    from alloc_moe.runtime.text_model import Completion

ep_option = click.option(
    "--ep",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Execution provider; auto is CUDA if it can be used, else the CPU.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads that share the work; by default one per physical core.",
)
session_option = click.option(
    "--session",
    "session_entries",
    metavar="NAME=VALUE",
    multiple=True,
    callback=lambda _context, _option, entries: dict(map(_named_value, entries)),
    help="What else to tell onnxruntime: an option of its sessions, as enable_cpu_mem_arena=0, or "
    "an entry of their configuration, as session.intra_op.allow_spinning=0. Repeatable.",
)
budget_option = click.option(
    "--budget",
    help="Activations per token, for artifacts compiled with --redistribute price: a fraction of "
    "the full model's with a decimal point, or a whole number. Default: as compiled.",
)


def _named_value(entry: str) -> tuple[str, str]:
    name, separator, value = entry.partition("=")
    if not (name and separator):
        raise click.BadParameter(f"{entry!r} is not NAME=VALUE.")
    return name, value


@click.command(epilog=examples("alloc-run out.onnx --prompt 'The committee' --max-new-tokens 64"))
@click.argument("artifact", type=click.Path())
@click.option("--prompt", "prompts", multiple=True, help="Text to continue. Repeatable.")
@click.option(
    "--prompt-file",
    "files",
    multiple=True,
    type=click.File("rb"),
    help="File whose whole text is a prompt; - is stdin. Repeatable.",
)
@click.option("--max-new-tokens", type=int, default=128, show_default=True)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that make up this probability.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the draws.")
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
    files: tuple[Any, ...],  # binary files, opened by click
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
    """Continue texts with ARTIFACT, an .onnx file or a bundle folder.

    One prompt is continued on stdout as the tokens come, several are worked on together and then
    printed one after the other. The prompt stands before its continuation.
    """
    from alloc_moe.runtime.sampling import Sampling
    from alloc_moe.runtime.text_model import load

    texts = [*prompts, *(_text(file) for file in files)]
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


@click.command(epilog=examples("alloc-inspect out.onnx", "alloc-inspect bundle/ --json"))
@click.argument("artifact", type=click.Path())
@common_options
def inspect_command(console: Console, artifact: str) -> None:
    """Show what was decided when ARTIFACT was compiled; its weights aren't needed for that."""
    from alloc_moe.runtime.files import find_artifact
    from alloc_moe.runtime.tables import plan_table

    files = find_artifact(artifact)
    data = {"artifact": str(files.graph), **json.loads(files.plan.to_json())}
    console.result(plan_table(files.plan, name=str(files.graph)), data)


@click.command(
    epilog=examples(
        "alloc-bench full.onnx half.onnx --prompt-tokens 512 --past 512 --runs 7",
        "alloc-bench dial.onnx --budget 0.5 --budget 0.25",
    )
)
@click.argument("artifacts", type=click.Path(), nargs=-1, required=True)
@click.option("--prompt-tokens", type=int, default=128, show_default=True, help="Prefill's length.")
@click.option(
    "--past", type=int, default=128, show_default=True, help="Tokens before the first decoded."
)
@click.option("--new-tokens", type=int, default=32, show_default=True, help="Tokens decoded.")
@click.option("--runs", type=int, default=5, show_default=True, help="Runs after the warm-up.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the tokens.")
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    help="Measure the one ARTIFACT, which has a dial, at this budget too. Repeatable.",
)
@ep_option
@threads_option
@session_option
@common_options
def bench_command(
    console: Console,
    artifacts: tuple[str, ...],
    prompt_tokens: int,
    past: int,
    new_tokens: int,
    runs: int,
    seed: int,
    budgets: tuple[str, ...],
    ep: Provider,
    threads: int | None,
    session_entries: dict[str, str],
) -> None:
    """Measure prefill and decode speed of ARTIFACTS in turns, and compare them with the first.

    The table shows the median, the slowest and the fastest run in tokens per second.
    """
    import onnxruntime

    from alloc_moe.runtime.bench import Workload, benchmark, machine
    from alloc_moe.runtime.dial import price_of
    from alloc_moe.runtime.session import open_session
    from alloc_moe.runtime.tables import speed_table

    if budgets and len(artifacts) > 1:
        raise click.UsageError("--budget is for one artifact; give that alone.")
    workload = Workload(prompt_tokens, past, new_tokens, runs, seed)
    sessions = []
    with console.progress("Loading", len(artifacts), unit="artifacts") as progress:
        for artifact in artifacts:
            session = open_session(
                artifact,
                ep=ep,
                threads=threads,
                stop_spinning=True,
                more_options=session_entries,
            )
            sessions.append(session)
            ep = sessions[0].device  # all on the same, and the reason for it told once
            progress.advance()
    prices = [None] * len(sessions) + [price_of(sessions[0].plan, budget) for budget in budgets]
    sessions += [sessions[0]] * len(budgets)
    names = [*artifacts, *(f"{artifacts[0]} at {budget}" for budget in budgets)]
    with console.progress("Measuring", len(sessions) * (runs + 1), unit="runs") as progress:
        measurements = benchmark(sessions, workload, prices=prices, on_run=progress.advance)
    setting = {
        "machine": machine(),
        "device": sessions[0].device,
        "threads": threads or "default",
        **session_entries,
        "onnxruntime": onnxruntime.__version__,
    }
    data = {
        **setting,
        "workload": dataclasses.asdict(workload),
        "artifacts": [
            {"artifact": name, "price": price, **_speeds(measurement, measurements[0])}
            for name, price, measurement in zip(names, prices, measurements, strict=True)
        ],
    }
    console.result(speed_table(names, measurements, workload, setting=setting), data)


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


def _text(file: Any) -> str:  # a binary file
    from alloc_moe.runtime.errors import GenerationError

    try:
        return str(file.read(), "utf-8")
    except UnicodeDecodeError as error:
        raise GenerationError(f"{file.name} is no UTF-8 text: {error}.") from error


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


def _speeds(measurement: Measurement, first: Measurement) -> dict[str, Any]:
    def summary(speed: Speed, reference: Speed) -> dict[str, Any]:
        return {
            "median": speed.median,
            "min": min(speed.runs),
            "max": max(speed.runs),
            "ratio_to_first": speed.ratio(reference),
            "runs": speed.runs,
        }

    return {
        "prefill_tokens_per_second": summary(measurement.prefill, first.prefill),
        "decode_tokens_per_second": summary(measurement.decode, first.decode),
    }
