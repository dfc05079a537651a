"""Largest logit error of compiled artifacts against PyTorch, by family: the table in README.

Small random checkpoints are compiled end to end at 60 % of their activations with the command line,
for both lowerings and all redistributions; each artifact runs in onnxruntime on the CPU.

    python examples/benchmarks/families.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_checkpoints import FAMILIES, save_checkpoint

REDISTRIBUTIONS = ("none", "batch", "sequence")


def compile_artifact(checkpoint: Path, output: Path, *options: str) -> dict[str, Any]:
    """Run alloc-compile in a process of its own and return its plan."""
    command = Path(sys.executable).with_name("alloc-compile")
    run = subprocess.run(
        [command, checkpoint, "--budget", "0.6", "-o", output, "--json", "-q", *options],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    plan: dict[str, Any] = json.loads(run.stdout)["plan"]
    return plan


def main() -> None:
    """Print a Markdown table."""
    print("| family | plan | " + " | ".join(REDISTRIBUTIONS) + " | pairs lowering |")
    print("|---|---|" + "---|" * (len(REDISTRIBUTIONS) + 1))
    for family, settings in FAMILIES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            checkpoint = save_checkpoint(folder / "model", settings)
            profile = ("--tokens", "512", "--profile", str(folder / "profile.json"))
            errors = []
            for redistribution in (*REDISTRIBUTIONS, "batch"):
                device = "cuda" if len(errors) == len(REDISTRIBUTIONS) else "cpu"
                options = (*profile, "--redistribute", redistribution, "--device", device)
                output = folder / f"{len(errors)}.onnx"
                plan = compile_artifact(checkpoint, output, *options)
                errors.append(f"{plan['verify']['max_abs_logit_error']:.1e}")
            ks = " ".join(str(layer["k"]) for layer in plan["layers"])
            print(f"| {family} | {ks} | " + " | ".join(errors) + " |", flush=True)


if __name__ == "__main__":
    main()
