"""What onnxruntime's session options change: speed and memory of an artifact under each.

    python examples/benchmarks/speed/session_options.py olmoe.onnx --rounds 5

Each setting has a process of its own in every round, which loads the artifact anew; they take
turns. Ratios are to the defaults within a round, medians over rounds (and ranges).
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence

import click
from contenders.turns import Process

from alloc_moe.runtime.measure.bench import machine

DECODE, PREFILL = "decode 128 32", "prefill 512"
_SPINNING = "session.intra_op.allow_spinning"
SETTINGS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "threads don't spin": (f"{_SPINNING}=0",),
    "no arena": ("enable_cpu_mem_arena=0",),
    "no memory pattern": ("enable_mem_pattern=0",),
    "neither": ("enable_cpu_mem_arena=0", "enable_mem_pattern=0"),
    "no prepacking": ("session.disable_prepacking=1",),
    "denormals are zero": ("session.set_denormal_as_zero=1",),
}


def measure(artifact: str, entries: Sequence[str], budget: float) -> dict[str, float]:
    """Load an artifact in a new process; return seconds per workload, and bytes."""
    given = [part for entry in entries for part in ("--session", entry)]
    with Process("artifact", sys.executable, "artifact", artifact, *given) as process:
        for workload in (DECODE, PREFILL):
            process.ask(f"{workload} {budget}")  # warms up
        return {
            "loading": process.hello["load_seconds"],
            "resident": process.hello["resident_bytes"],
            "decode": process.ask(f"{DECODE} {budget}"),
            "prefill": process.ask(f"{PREFILL} {budget}"),
        }


def ratio(values: Sequence[float], base: Sequence[float]) -> str:
    """Return the median and the range of paired ratios."""
    found = [value / other for value, other in zip(values, base, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"


@click.command(help=f"\b\n{__doc__}")
@click.argument("artifact")
@click.option("--rounds", default=5, show_default=True)
@click.option("--budget", default=0.5, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(SETTINGS)), help="Repeatable.")
def main(artifact: str, rounds: int, budget: float, only: tuple[str, ...]) -> None:
    """Print a table."""
    names = ["defaults", *(name for name in SETTINGS if name != "defaults")]
    names = [name for name in names if not only or name in only or name == "defaults"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            found[name].append(measure(artifact, SETTINGS[name], budget))
        click.echo(f"Round {number + 1} of {rounds}", err=True)
    print(f"{machine()}, {os.cpu_count()} threads, {artifact} at {budget}\n")
    print("| session | decode | prefill | loading | resident, GB |\n|---|---|---|---|---|")
    columns = ("decode", "prefill", "loading")
    base = {column: [run[column] for run in found["defaults"]] for column in columns}
    for name in names:
        cells = [ratio([run[column] for run in found[name]], base[column]) for column in columns]
        resident = statistics.median(run["resident"] for run in found[name]) / 1e9
        print(f"| {name} | {' | '.join(cells)} | {resident:.2f} |")


if __name__ == "__main__":
    main()
