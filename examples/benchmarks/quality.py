"""Held-out perplexity of every way to spend the same activations: the table in README.

The model is exported once. Every plan becomes an artifact of its own, which alloc-eval then runs on
the held-out text; nothing is simulated. Results are kept: an interrupted run goes on where it was.

    python examples/benchmarks/quality.py examples/tiny-moe \
        --text examples/tiny-moe/heldout.txt -o quality
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from alloc_moe.compiler import package, pipeline
from alloc_moe.compiler.allocate import make_plan, parse_budget
from alloc_moe.compiler.records import Metric, MoeModel, Redistribution, SensitivityProfile
from alloc_moe.compiler.sensitivity import measure_sensitivity
from alloc_moe.runtime.command import Console


@dataclass(frozen=True)
class Method:
    """A way to spend a budget: `metric` None is the same k in every layer."""

    name: str
    metric: Metric | None
    redistribution: Redistribution


METHODS = (
    Method("uniform k", None, "none"),
    Method("Alloc-L (kl)", "kl", "none"),
    Method("Alloc-L (ppl-suffix)", "ppl-suffix", "none"),
    Method("Alloc-T batch, uniform k", None, "batch"),
    Method("both (kl), batch", "kl", "batch"),
    Method("both (ppl-suffix), batch", "ppl-suffix", "batch"),
    Method("Alloc-T sequence, uniform k", None, "sequence"),
    Method("both (kl), sequence", "kl", "sequence"),
)


@click.command()
@click.argument("model")
@click.option("--text", required=True, help="Held-out text.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder.")
@click.option("--budgets", default="0.25,0.375,0.5,0.75", show_default=True)
@click.option("--tokens", default=8192, show_default=True, help="Calibration tokens.")
@click.option("--stride", default=448, show_default=True, help="Tokens from window to window.")
@click.option("--text-tokens", type=int, help="Evaluate on the text's first tokens only.")
def main(
    model: str,
    text: str,
    output: Path,
    budgets: str,
    tokens: int,
    stride: int,
    text_tokens: int | None,
) -> None:
    """Measure all methods at all BUDGETS and print a Markdown table."""
    output.mkdir(exist_ok=True)
    console = Console()
    moe = pipeline.load(model, console, trust_remote_code=False)
    calibration = pipeline.calibrate(moe, None, console, tokens=tokens, seed=0)
    profiles = {
        metric: measure_sensitivity(
            moe,
            calibration,
            metric=metric,
            path=output / f"{metric}.profile.json",
            console=console,
        )
        for metric in ("kl", "ppl-suffix")
    }
    results = Results(output / "results.json")
    settings = ["--stride", str(stride)]
    settings += ["--tokens", str(text_tokens)] if text_tokens else []
    results.get("full model", lambda: evaluate(model, text, settings))
    graph = pipeline.export(moe, dtype="float32")
    full = "1.0"
    for budget in (full, *budgets.split(",")):
        for method in METHODS:
            if budget == full and method.metric:
                continue  # there is only one plan then
            path = output / "artifact.onnx"

            def measure(method: Method = method, budget: str = budget, path: Path = path) -> Any:
                profile = profiles[method.metric] if method.metric else None
                artifact = specialize(moe, graph, profile, method, budget)
                package.save_graph(artifact, path)
                return evaluate(str(path), text, settings)

            found = results.get(f"{method.name} @ {budget}", measure)
            check_activations(found)
    print(table(results, budgets.split(",")))
    for method in METHODS:
        if not method.metric:
            ratio = results.get(f"{method.name} @ {full}", None)["loss"]
            ratio -= results.get("full model", None)["loss"]
            print(f"{method.name} at budget 1.0: loss {ratio:+.1e} against the original")
    for metric, profile in profiles.items():
        print(f"Profiling with {metric}: {profile.seconds:.0f} s for {profile.tokens} tokens")


class Results:
    """Measurements by name, saved after each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, measure: Any) -> dict[str, Any]:
        """Return the measurement of that name, made now if it wasn't before."""
        if name not in self._found:
            start = time.monotonic()
            self._found[name] = measure()
            self._path.write_text(json.dumps(self._found, indent=1))
            loss = self._found[name]["loss"]
            print(f"{name}: loss {loss:.5f}, {time.monotonic() - start:.0f} s", file=sys.stderr)
        found: dict[str, Any] = self._found[name]
        return found


def specialize(
    moe: MoeModel, graph: Any, profile: SensitivityProfile | None, method: Method, budget: str
) -> Any:
    """Return the artifact's graph for a method and a budget."""
    plan = make_plan(
        moe.layers,
        parse_budget(budget, [layer.experts_per_token for layer in moe.layers]),
        source=moe.source,
        profile=profile,
        redistribution=method.redistribution,
        weights="keep",
    )
    return pipeline.specialize(graph, plan, device="cpu")


def evaluate(target: str, text: str, options: list[str]) -> dict[str, Any]:
    """Run alloc-eval in a process of its own and return its JSON."""
    command = [sys.executable, "-m", "alloc_moe.compiler.cli_eval", target, "--text", text]
    run = subprocess.run(
        [*command, "--json", "-q", *options], check=True, stdout=subprocess.PIPE, text=True
    )
    data: dict[str, Any] = json.loads(run.stdout)
    return data


def check_activations(found: dict[str, Any]) -> None:
    """Stop if an artifact executed other activations than its plan says."""
    planned = [layer["k"] * found["tokens_run"] for layer in found["plan"]["layers"]]
    if found["activations"] != planned:
        sys.exit(f"Executed {found['activations']}, planned {planned}")


def table(results: Results, budgets: list[str]) -> str:
    """Return perplexities as a Markdown table, the loss over the full model in brackets."""
    full = results.get("full model", None)
    lines = [
        f"Full model: perplexity {full['perplexity']:.3f} on {full['tokens_scored']} tokens.",
        "",
        "| method | " + " | ".join(budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for method in METHODS:
        found = [results.get(f"{method.name} @ {budget}", None) for budget in budgets]
        cells = [f"{f['perplexity']:.3f} ({f['loss'] - full['loss']:+.4f})" for f in found]
        lines.append(f"| {method.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
