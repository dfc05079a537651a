"""Where the time goes: milliseconds per operator of a decode step or a prefill.

    python examples/benchmarks/speed/operators.py olmoe.onnx --past 128
    python examples/benchmarks/speed/operators.py olmoe.onnx --tokens 512 --past 0 --budget 0.5

Profiling itself costs some microseconds per operator, so the total is above that of a timed run.
"""

from __future__ import annotations

import collections
import json
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from alloc_moe.runtime.artifact.dial import price_of
from alloc_moe.runtime.artifact.files import find_artifact
from alloc_moe.runtime.execution.providers import create_session, session_options
from alloc_moe.runtime.execution.session import ArtifactSession


def profile(
    artifact: str, *, tokens: int, past: int, runs: int, budget: str | None
) -> tuple[float, dict[str, tuple[float, int]]]:
    """Return milliseconds per call, and per operator with how often it runs in a call."""
    files = find_artifact(artifact)
    options = session_options(more={"enable_profiling": "1"})
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        loaded = create_session(str(files.graph), options, ep="cpu", name=files.graph)
        session = ArtifactSession(loaded, files, counting=False)
        asked: dict[str, Any] = {"logits_to_keep": 1}
        if budget is not None:
            asked["price"] = price_of(files.plan, budget)
        random = np.random.default_rng(0)
        vocabulary = session.vocabulary or 256
        cache = session.empty_cache(1, capacity=past + tokens * (runs + 1))
        for start in range(0, past, 512):
            piece = random.integers(0, vocabulary, (1, min(512, past - start)))
            session.run(piece, cache=cache, **asked)
        for _ in range(runs + 1):  # the first warms up
            cache.truncate(past)
            session.run(random.integers(0, vocabulary, (1, tokens)), cache=cache, **asked)
        events = json.loads(Path(loaded.end_profiling()).read_text("utf-8"))
    calls = [event for event in events if event["name"] == "model_run"][-runs:]
    spent: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for event in events:
        if event["name"].endswith("_kernel_time") and event["ts"] >= calls[0]["ts"]:
            spent[event["args"]["op_name"]] += event["dur"]
            count[event["args"]["op_name"]] += 1
    total = sum(call["dur"] for call in calls) / runs / 1000
    return total, {
        name: (micros / runs / 1000, count[name] // runs) for name, micros in spent.most_common()
    }


@click.command()
@click.argument("artifact")
@click.option("--tokens", default=1, show_default=True, help="In a call.")
@click.option("--past", default=128, show_default=True)
@click.option("--runs", default=10, show_default=True)
@click.option("--budget", help="For artifacts with a dial.")
@click.option("--rows", default=8, show_default=True, help="Operators to list one by one.")
def main(artifact: str, tokens: int, past: int, runs: int, budget: str | None, rows: int) -> None:
    """Print the operators that take the most time."""
    total, found = profile(artifact, tokens=tokens, past=past, runs=runs, budget=budget)
    print(
        f"{tokens} tokens after {past}, budget {budget or 'as compiled'}: {total:.1f} ms per call"
    )
    print("\n| operator | ms | share | nodes |\n|---|---|---|---|")
    listed = list(found.items())
    for name, (milliseconds, nodes) in listed[:rows]:
        print(f"| {name} | {milliseconds:.2f} | {milliseconds / total:.0%} | {nodes} |")
    rest = sum(milliseconds for _, (milliseconds, _) in listed[rows:])
    nodes = sum(nodes for _, (_, nodes) in listed[rows:])
    print(f"| {len(listed[rows:])} others | {rest:.2f} | {rest / total:.0%} | {nodes} |")


if __name__ == "__main__":
    main()
