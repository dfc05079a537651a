"""Serve many budgets: with one artifact that has a dial, or with one per budget of a single export.

A dial needs one file, and every call may have its own budget. An artifact of the budget that runs
has corrections that were fitted to it, so its loss is lower.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from alloc_moe.compiler import pipeline
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.planning.allocation import parse_budget
from alloc_moe.compiler.planning.plan import PlanOptions, make_planned
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.runtime import open_session, price_of
from alloc_moe.runtime.console import Console
from alloc_moe.runtime.measure.evaluate import evaluate_artifact

BUDGETS = ("0.25", "0.5", "0.75")


def main(model: str, folder: str, text: str, *, tokens: int = 8192) -> None:
    """Write an artifact per budget into `folder`; compare each with the dial of 0.5 on `text`."""
    console, target = Console(), Path(folder)
    target.mkdir(exist_ok=True)
    moe = pipeline.load(model, console, trust_remote_code=False)
    calibration = pipeline.calibrate(moe, None, console, tokens=tokens, seed=0)
    setting = {"metric": "fisher", "redistribution": "price", "path": target / "profile.json"}
    profile = measure_sensitivity(moe, calibration, console=console, **setting)
    graph = export_model(moe, dtype="float32")
    for budget in BUDGETS:
        start = time.perf_counter()
        wanted = parse_budget(budget, [layer.experts_per_token for layer in moe.layers])
        options = PlanOptions(dial=budget == "0.5")
        made = (moe, calibration, wanted, options)
        planned = make_planned(*made, source=model, profile=profile, console=Console(quiet=True))
        artifact = specialize(graph, planned.plan, device="cpu", corrections=planned.corrections)
        package.save_graph(artifact, target / f"budget-{budget}.onnx")
        print(f"budget-{budget}.onnx made in {time.perf_counter() - start:.0f} s")

    ids = moe.checkpoint.tokenizer(Path(text).read_text("utf-8"), verbose=False)["input_ids"][:4096]
    for budget in BUDGETS:
        for compiled in dict.fromkeys(("0.5", budget)):
            path = target / f"budget-{compiled}.onnx"
            session = open_session(path, ep="cpu", count_activations=True)
            # Without a price an artifact runs at the budget it was compiled for.
            price = None if compiled == budget else price_of(session.plan, budget)
            found = evaluate_artifact(session, ids, price=price)
            executed = sum(found.activations_per_token or ())
            print(f"{path.name} at {budget}: {executed:.2f} experts, loss {found.loss:.4f}")


if __name__ == "__main__":
    tiny = Path(__file__).parent / "tiny-moe"
    main(*(sys.argv[1:] or [str(tiny), "budgets", str(tiny / "heldout.txt")]))
