"""Largest logit error of compiled artifacts against PyTorch, by family.

Small random checkpoints go through the compiler's stages: profile, allocation at 60 % of their
activations, export, and then both lowerings and all redistributions, each artifact being verified
in onnxruntime on the CPU over a left-padded batch, prefill and decode.

    python examples/benchmarks/quality/families.py [FAMILY...]

Without names it takes all, half a minute each.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

from alloc_moe.compiler.calibration.windows import calibrate
from alloc_moe.compiler.export.normalize import export_model
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.planning.allocation import make_plan, parse_budget
from alloc_moe.compiler.records import CalibrationOptions, Redistribution
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.compiler.verify.parity import verify_artifact
from alloc_moe.runtime.console import Console

SMALL = Path(__file__).parents[2] / "checkpoints" / "small.py"
REDISTRIBUTIONS: tuple[Redistribution, ...] = ("none", "batch", "sequence")


def family_row(folder: Path, family: str) -> str:
    """Return a Markdown row on the model in `folder`: its plan, and each artifact's error."""
    moe = load_model(str(folder))
    text = calibrate(moe.checkpoint, CalibrationOptions(tokens=512), Console(quiet=True))
    profile = measure_sensitivity(moe, text, metric="kl")
    budget = parse_budget("0.6", [layer.experts_per_token for layer in moe.layers])
    graph = export_model(moe, dtype="float32")
    errors = []
    for device in ("cpu", "cuda"):
        for redistribution in REDISTRIBUTIONS:
            plan = make_plan(
                moe.layers,
                budget,
                source=family,
                profile=profile,
                redistribution=redistribution,
                weights="keep",
            )
            package.save_graph(specialize(graph, plan, device=device), folder / "out.onnx")
            found = verify_artifact(folder / "out.onnx", moe, plan, text.ids, dtype="float32")
            errors.append(f"{found.max_abs_logit_error:.1e}")
    ks = " ".join(str(layer.k) for layer in plan.layers)
    trained = " ".join(str(layer.k_original) for layer in plan.layers)
    return f"| {family} | {trained} -> {ks} | " + " | ".join(errors) + " |"


def main() -> None:
    """Print a Markdown table."""
    names = [*REDISTRIBUTIONS, *(f"{name}, pairs" for name in REDISTRIBUTIONS)]
    print("| family | experts per token | " + " | ".join(names) + " |")
    print("|---|---|" + "---|" * len(names))
    small: dict[str, Any] = runpy.run_path(str(SMALL))  # what that script defines
    for family in sys.argv[1:] or small["FAMILIES"]:
        settings = small["FAMILIES"][family]
        with tempfile.TemporaryDirectory() as folder:
            small["save_checkpoint"](Path(folder), settings)
            print(family_row(Path(folder), family), flush=True)


if __name__ == "__main__":
    main()
