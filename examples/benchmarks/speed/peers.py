"""An artifact beside llama.cpp and transformers at the same activations, in turns.

    pip install llama-cpp-python gguf
    python examples/benchmarks/speed/random_gguf.py -o olmoe-q4_0.gguf
    python examples/benchmarks/speed/peers.py --artifact olmoe-int4.onnx --gguf olmoe-q4_0.gguf

Every contender is a process of its own, stopped (SIGSTOP) while another is timed, since threads
that spin would take its processors. They take turns, A B C A B C ..., for each workload. Ratios are
medians over rounds, each formed within a round. The first artifact is compared with all others.
llama-cpp-python and torch may be in other virtual environments: --llama-python, --torch-python.

Memory of the OLMoE-1B-7B shape, of all contenders at once: an int4 artifact takes 4 to 8 GB, a Q4_0
file 4 GB per budget, bfloat16 14 GB, float32 1.7 GB per layer and 0.8 (see --float32-layers).
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from bandwidth import Reader
from contenders.report import Results, claims, limits, table
from contenders.turns import Contestant, Process, count, run_rounds

from alloc_moe.runtime.artifact.files import find_artifact
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.measure.bench import machine

WORKLOADS = ("decode 128 32", "prefill 128", "prefill 512")


@click.command(help=f"\b\n{__doc__}")
@click.option("--artifact", "artifacts", multiple=True, required=True, help="Repeatable.")
@click.option("--gguf", help="A model for llama.cpp.")
@click.option(
    "--torch",
    "dtypes",
    multiple=True,
    type=click.Choice(["bfloat16", "float32"]),
    help="A random model for transformers. Repeatable.",
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    type=float,
    default=(1.0, 0.5, 0.25),
    show_default=True,
    help="Fraction of the expert activations; artifacts without a dial run as compiled.",
)
@click.option("--workload", "workloads", multiple=True, default=WORKLOADS, show_default=True)
@click.option("--rounds", default=9, show_default=True, help="After one to warm up.")
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--shape", default="olmoe-1b-7b", show_default=True, help="Of transformers' model.")
@click.option("--float32-layers", help="Time that many layers only, and extend to all.")
@click.option("--llama-python", default=sys.executable, help="Has llama-cpp-python and gguf.")
@click.option("--torch-python", default=sys.executable, help="Has torch and transformers.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Every run, as JSON.")
def main(output: Path | None, **options: Any) -> None:  # what click read above
    """Print a table and what it says."""
    results = compare(**options)
    print(f"{machine()}, {options['threads']} threads\n")
    ours = _name(options["artifacts"][0])
    print("\n".join([*table(results), "", *claims(results, ours), "", *limits(results)]))
    if output is not None:
        output.write_text(json.dumps(_plain(dataclasses.asdict(results)), indent=1))


def compare(
    *,
    artifacts: tuple[str, ...],
    gguf: str | None,
    dtypes: tuple[str, ...],
    budgets: tuple[float, ...],
    workloads: tuple[str, ...],
    rounds: int,
    threads: int,
    shape: str,
    float32_layers: str | None,
    llama_python: str,
    torch_python: str,
) -> Results:
    """Return the timings of all contenders that are asked for."""
    plans = {path: find_artifact(path).plan for path in artifacts}
    layers = plans[artifacts[0]].layers
    results = Results(sum(layer.k_original for layer in layers) / len(layers))
    many = "--threads", str(threads)

    def artifact(path: str, *options: str) -> Process:
        return Process(_name(path), sys.executable, "artifact", path, *many, *options)

    for path, plan in plans.items():
        with artifact(path, "--count") as process:
            count(results, [(process, budget) for budget in _budgets(plan, budgets)], workloads)
    with ExitStack() as stack:
        contestants: list[Contestant] = []
        peers: list[Contestant] = []

        def enter(process: Process, at: tuple[float, ...]) -> list[Contestant]:
            click.echo(stack.enter_context(process).loaded(), err=True)
            return [(process, budget) for budget in at]

        for path, plan in plans.items():
            contestants += enter(artifact(path), _budgets(plan, budgets))
        if gguf is not None:
            process = Process("llama.cpp", llama_python, "llama", gguf, *many)
            peers += enter(process, budgets)
        for dtype in dtypes:
            fewer = ("--layers", float32_layers) if float32_layers and dtype == "float32" else ()
            sizes = "--shape", shape, *fewer
            name = f"transformers {dtype}"
            process = Process(name, torch_python, "pytorch", dtype, *many, *sizes)
            peers += enter(process, budgets)
        reader = Reader(threads)
        run_rounds(results, [*contestants, *peers], workloads, rounds=rounds, reader=reader)
        count(results, peers, workloads)
    return results


def _name(path: str) -> str:
    return f"alloc-moe {Path(path).stem}"


def _budgets(plan: AllocationPlan, budgets: tuple[float, ...]) -> tuple[float, ...]:
    """The budgets that an artifact runs at: without a dial, the one it was compiled for."""
    return budgets if plan.dial else (round(plan.budget.activations / plan.budget.original, 2),)


def _plain(value: Any) -> Any:  # JSON, whose keys are texts
    if isinstance(value, dict):
        return {
            key if isinstance(key, str) else f"{key[0]} {key[1]}": _plain(each)
            for key, each in value.items()
        }
    return value


if __name__ == "__main__":
    main()
