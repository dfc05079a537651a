"""Serve many budgets: with one artifact that has a dial, or with one per budget.

A dial needs one file, and every call may have its own budget. An artifact of the budget that runs
has corrections that were fitted to it, so its loss is lower.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from alloc_moe.compiler import compile
from alloc_moe.runtime import load, open_session, price_of
from alloc_moe.runtime.console import Console
from alloc_moe.runtime.measure.evaluate import evaluate_artifact

BUDGETS = (0.25, 0.5, 0.75)


def main(model: str, folder: str, text: str, *, tokens: int = 8192) -> None:
    """Write an artifact per budget into `folder`; compare each with the dial of 0.5 on `text`."""
    console, target = Console(), Path(folder)
    target.mkdir(exist_ok=True)
    profile = target / "profile.json"  # measured once: it is the same at every budget
    paths = {budget: target / f"budget-{budget}.onnx" for budget in BUDGETS}
    for budget, path in paths.items():
        start = time.perf_counter()
        compile(
            model,
            budget=budget,
            output=path,
            tokens=tokens,
            profile=profile,
            force=True,
            console=console,
        )
        print(f"{path.name} made in {time.perf_counter() - start:.0f} s")

    ids = load(paths[0.5]).encode(Path(text).read_text("utf-8"))[:4096]
    for budget in BUDGETS:
        for compiled in dict.fromkeys((0.5, budget)):
            session = open_session(paths[compiled], ep="cpu", count_activations=True)
            # Without a price an artifact runs at the budget it was compiled for.
            price = None if compiled == budget else price_of(session.plan, budget)
            found = evaluate_artifact(session, ids, price=price)
            executed = sum(found.activations_per_token or ())
            print(f"{paths[compiled].name} at {budget}: {executed:.2f} experts, ", end="")
            print(f"loss {found.loss:.4f}")


if __name__ == "__main__":
    tiny = Path(__file__).parent / "tiny-moe"
    main(*(sys.argv[1:] or [str(tiny), "budgets", str(tiny / "heldout.txt")]))
