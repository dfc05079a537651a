"""Export a model once and specialise it for several budgets: each takes about a second."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from alloc_moe.compiler import package, pipeline
from alloc_moe.compiler.allocate import make_plan, parse_budget
from alloc_moe.compiler.sensitivity import measure_sensitivity
from alloc_moe.runtime.command import Console


def main(model: str, folder: str, *, tokens: int = 8192) -> None:
    """Write one artifact per budget into `folder`, all of one profile and one export."""
    console = Console()
    moe = pipeline.load(model, console, trust_remote_code=False)
    text = pipeline.calibrate(moe, None, console, tokens=tokens, seed=0)
    target = Path(folder)
    target.mkdir(exist_ok=True)
    profile = measure_sensitivity(
        moe,
        text,
        metric="kl",
        redistribution="batch",
        path=target / "profile.json",
        console=console,
    )
    graph = pipeline.export(moe, dtype="float32")
    for requested in ("0.375", "0.5", "0.75"):
        start = time.perf_counter()
        plan = make_plan(
            moe.layers,
            parse_budget(requested, [layer.experts_per_token for layer in moe.layers]),
            source=model,
            profile=profile,
            redistribution="batch",
            weights="keep",
        )
        artifact = pipeline.specialize(graph, plan, device="cpu")
        package.save_graph(artifact, target / f"budget-{requested}.onnx")
        seconds = time.perf_counter() - start
        print(f"{requested}: {[layer.k for layer in plan.layers]} in {seconds:.1f} s")


if __name__ == "__main__":
    here = Path(__file__).parent
    main(*(sys.argv[1:] or [str(here / "tiny-moe"), "budgets"]))
