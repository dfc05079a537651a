"""alloc-bench: the speed of artifacts, measured in turns."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from alloc_moe.runtime.commands.failures import Command
from alloc_moe.runtime.commands.numeric import (
    MOST_RUNS,
    BudgetText,
    WholeFrom,
    seed_type,
    tokens_type,
)
from alloc_moe.runtime.commands.options import (
    common_options,
    ep_option,
    examples,
    session_option,
    threads_option,
)
from alloc_moe.runtime.console import Console

# numpy, onnxruntime and rich load inside the functions, to keep --help quick.
if TYPE_CHECKING:
    from alloc_moe.runtime.execution.providers import Provider
    from alloc_moe.runtime.measure.bench import Measurement, Speed


@click.command(
    cls=Command,
    epilog=examples(
        "alloc-bench full.onnx half.onnx --prompt-tokens 512 --past 512 --runs 7",
        "alloc-bench dial.onnx --budget 0.5 --budget 0.25",
    ),
)
@click.argument("artifacts", type=click.Path(), nargs=-1, required=True)
@click.option(
    "--prompt-tokens", type=tokens_type(), default=128, show_default=True, help="Prefill's length."
)
@click.option(
    "--past",
    type=tokens_type(0),
    default=128,
    show_default=True,
    help="Tokens before the first decoded.",
)
@click.option(
    "--new-tokens", type=tokens_type(), default=32, show_default=True, help="Tokens decoded."
)
@click.option(
    "--runs",
    type=WholeFrom(1, MOST_RUNS),
    default=5,
    show_default=True,
    help="Runs after the warm-up.",
)
@click.option("--seed", type=seed_type, default=0, show_default=True, help="Seed of the tokens.")
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    type=BudgetText(),
    help="Measure the one ARTIFACT, which has a dial, at this budget too. Repeatable.",
)
@click.option(
    "--hold",
    is_flag=True,
    help="Measure the one ARTIFACT with each of its budgets held too, see alloc-run. Experts that "
    "run are then counted for all.",
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
    hold: bool,
    ep: Provider,
    threads: int | None,
    session_entries: dict[str, str],
) -> None:
    """Measure prefill and decode speed of ARTIFACTS in turns, and compare them with the first.

    The table shows the median, the slowest and the fastest run in tokens per second.
    """
    import onnxruntime

    from alloc_moe.runtime.artifact.dial import price_of
    from alloc_moe.runtime.commands.tables import speed_table
    from alloc_moe.runtime.execution.session import open_session
    from alloc_moe.runtime.measure.bench import Workload, benchmark, machine
    from alloc_moe.runtime.text.hold import HeldBudget, held_budget

    if (budgets or hold) and len(artifacts) > 1:
        option = "--budget" if budgets else "--hold"
        raise click.UsageError(f"{option} is for one artifact; give that alone.")
    workload = Workload(prompt_tokens, past, new_tokens, runs, seed)
    sessions = []
    with console.progress("Loading", len(artifacts), unit="artifacts") as progress:
        for artifact in artifacts:
            session = open_session(
                artifact,
                ep=ep,
                threads=threads,
                count_activations=hold,
                stop_spinning=True,
                more_options=session_entries,
            )
            sessions.append(session)
            ep = sessions[0].device  # all on the same, and the reason for it told once
            progress.advance()
    prices: list[float | HeldBudget | None] = [None] * len(sessions)
    prices += [price_of(sessions[0].plan, budget) for budget in budgets]
    names = [*artifacts, *(f"{artifacts[0]} at {budget}" for budget in budgets)]
    if hold:
        prices += [held_budget(sessions[0], budget) for budget in (None, *budgets)]
        names += [f"{name}, held" for name in names]
    sessions += [sessions[0]] * (len(names) - len(sessions))
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
            {
                "artifact": name,
                "price": None if isinstance(price, HeldBudget) else price,
                "held": price.activations if isinstance(price, HeldBudget) else None,
                **_speeds(measurement, measurements[0]),
            }
            for name, price, measurement in zip(names, prices, measurements, strict=True)
        ],
    }
    console.result(speed_table(names, measurements, workload, setting=setting), data)


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
