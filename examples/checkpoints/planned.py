"""Generate text in transformers with what `alloc-compile --target checkpoint` wrote.

    alloc-compile examples/tiny-moe --budget 0.5 -o planned/ --target checkpoint
    python examples/checkpoints/planned.py planned/ "The committee of the House"

`apply_plan` is all that a program of your own needs. It covers the redistributions price,
threshold and none, with any k per layer and any correction; in batch, sequence and with --cap the
tokens of a call compete, which needs an artifact.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def apply_plan(model: Any, folder: Path) -> None:
    """Let a model that was loaded from the folder run the experts that the plan beside it keeps."""
    plan = json.loads((folder / "alloc_plan.json").read_text("utf-8"))
    if plan["redistribution"] not in ("price", "threshold", "none") or "cap" in plan:
        sys.exit(
            f"{folder} was planned with --redistribute {plan['redistribution']}"
            f"{' and a --cap' * ('cap' in plan)}, which isn't covered here. Compile it with price, "
            "threshold or none and no --cap, or an artifact, without --target."
        )
    shifts = plan["checkpoint"].get("shifts")
    tensors = load_file(folder / shifts, device=str(model.device)) if shifts else {}
    for layer in plan["layers"]:
        name = layer["experts_module"]
        experts = model.get_submodule(name)
        shift = tensors.get(f"{name}.shift")
        experts.forward = functools.partial(run_planned, experts.forward, plan, layer, shift)


def run_planned(
    forward: Any, plan: Any, layer: Any, shift: Any, hidden: Any, ids: Any, weights: Any
) -> Any:
    """Run the kept candidates of [T, K]: transformers skips an id that no expert has."""
    weights, order = weights.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    rank = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if plan["redistribution"] == "price":
        added = torch.tensor(layer["sizes"], device=ids.device)[ids] * weights.float()
        behind = added.flip(-1).cumsum(-1).flip(-1) - added
        score = (added * (added + 2 * plan.get("overlap", 0.0) * behind)).sqrt()
        keep = (rank < 1) | (score >= plan["price"])
    elif plan["redistribution"] == "threshold":
        keep = (rank < 1) | (weights.float() >= layer["threshold"])
    else:
        keep = rank < layer["k"]
    kept = weights * keep
    if plan["weights"] == "renorm":
        kept = kept * weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)
    output = forward(hidden, ids.masked_fill(~keep, layer["experts"]), kept)
    if shift is None:
        return output
    dense = kept.new_zeros(len(ids), layer["experts"]).scatter(1, ids, kept)
    return output + (dense.float() @ shift).to(output.dtype)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    apply_plan(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(sys.argv[2], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(ids[0]))
