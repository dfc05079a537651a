"""Compile a checkpoint at half its expert activations, then generate text without torch."""

from __future__ import annotations

import sys
from pathlib import Path

from alloc_moe import runtime
from alloc_moe.compiler import compile
from alloc_moe.runtime.console import Console


def main(model: str, output: str, *, tokens: int = 8192, new_tokens: int = 40) -> None:
    """Compile `model` into the bundle folder `output` and continue two prompts with it."""
    compiled = compile(
        model, budget=0.5, output=output, tokens=tokens, force=True, console=Console()
    )
    experts = " ".join(f"{layer.k:.2f}" for layer in compiled.plan.layers)
    print(f"Experts per layer: {experts}, trained with {compiled.plan.layers[0].k_original}")

    text_model = runtime.load(compiled.path)
    prompts = ["The committee of the House", "In the beginning"]
    for completion in text_model.generate(prompts, max_new_tokens=new_tokens):
        print(f"{completion.prompt!r} -> {completion.text!r}")


if __name__ == "__main__":
    here = Path(__file__).parent
    main(*(sys.argv[1:] or [str(here / "tiny-moe"), "half/"]))
