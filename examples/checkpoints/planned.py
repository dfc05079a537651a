"""Generate text in transformers with what `alloc-compile --target checkpoint` wrote.

    alloc-compile examples/tiny-moe --budget 0.5 -o planned/ --target checkpoint
    python examples/checkpoints/planned.py planned/ "The committee of the House"

`apply_plan` is all that a program of your own needs. It covers the redistributions price,
threshold and none, with any k per layer and any correction; in batch, sequence and with --cap the
tokens of a call compete, which needs an artifact. It shows what a plan computes, and saves no time:
transformers runs as many experts as ever.
"""

from __future__ import annotations

import base64
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

DECIDES = {"price": "sizes", "threshold": "threshold", "none": "k"}
"""What a layer's entry in the plan has to have, by redistribution."""
LIMIT = 2.5
"""The greatest logarithm of what a token multiplies a size by, up or down."""


def apply_plan(model: Any, folder: Path) -> None:
    """Let a model that was loaded from the folder run the experts that the plan beside it keeps.

    The program ends with a sentence if it can't.
    """
    try:
        plan, shifts = read_plan(folder, str(model.device))
        modules = [model.get_submodule(layer["experts_module"]) for layer in plan["layers"]]
        for layer in plan["layers"]:
            layer["token_sizes"] = token_sizes(layer, str(model.device))
    except (
        *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError),
        SafetensorError,
    ) as error:
        sys.exit(
            f"The plan in {folder} can't be read, or is another model's "
            f"({type(error).__name__}: {error}). Copy the folder again, or compile it again."
        )
    if any(getattr(experts.forward, "func", None) is run_planned for experts in modules):
        sys.exit("The model runs under a plan already. Load it again for another.")
    for experts, layer in zip(modules, plan["layers"], strict=True):
        shift = shifts.get(f"{layer['experts_module']}.shift")
        experts.forward = functools.partial(run_planned, experts.forward, plan, layer, shift)


def read_plan(folder: Path, device: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the plan and the shifts beside a checkpoint, when what runs them is there."""
    plan = json.loads((Path(folder) / "alloc_plan.json").read_text("utf-8"))
    if plan["format"] != 1:
        raise ValueError(f"format {plan['format']} is newer than this program")
    decides = DECIDES.get(plan["redistribution"])
    if decides is None or "cap" in plan:
        sys.exit(
            f"{folder} was planned with --redistribute {plan['redistribution']}"
            f"{' and a --cap' * ('cap' in plan)}, which isn't covered here. Compile it with price, "
            "threshold or none and no --cap, or an artifact, without --target."
        )
    if decides == "sizes" and not plan["price"] >= 0:
        raise ValueError(f"the price is {plan['price']}")
    for layer in plan["layers"]:
        if decides == "sizes" and len(layer["sizes"]) != layer["experts"]:
            raise ValueError(f"{len(layer['sizes'])} sizes for {layer['experts']} experts")
        layer[decides]
    shifts = plan["checkpoint"].get("shifts")
    return plan, load_file(Path(folder) / shifts, device=device) if shifts else {}


def token_sizes(layer: Any, device: str) -> torch.Tensor | None:
    """Return what makes a layer's sizes a token's own [hidden + 1, experts]: a bias is last."""
    given = layer.get("token_sizes")
    if given is None:
        return None
    numbers = bytearray(base64.b64decode(given["values"], validate=True))
    flat = torch.frombuffer(numbers, dtype=torch.float16).to(device, torch.float32)
    return flat.view(given["hidden"] + 1, layer["experts"])


def run_planned(
    forward: Any, plan: Any, layer: Any, shift: Any, hidden: Any, ids: Any, weights: Any
) -> Any:
    """Add up the kept candidates of [T, K]; the best stands in for others, with weight zero."""
    weights, order = weights.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    rank = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if plan["redistribution"] == "price":
        sizes = torch.tensor(layer["sizes"], device=ids.device)[ids]
        if layer["token_sizes"] is not None:
            logs = hidden.float() @ layer["token_sizes"][:-1] + layer["token_sizes"][-1]
            sizes = sizes * logs.clamp(-LIMIT, LIMIT).exp().gather(-1, ids)
        added = sizes * weights.float()
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
    output = forward(hidden, torch.where(keep, ids, ids[:, :1]), kept)
    if shift is None:
        return output
    dense = kept.new_zeros(len(ids), layer["experts"]).scatter(1, ids, kept)
    return output + (dense.float() @ shift).to(output.dtype)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not (Path(sys.argv[1]) / "alloc_plan.json").is_file():
        sys.exit("Give a folder with an alloc_plan.json in it, and a text to continue.")
    folder = Path(sys.argv[1])
    [written] = AutoConfig.from_pretrained(folder).architectures  # not all have an auto class
    model = getattr(transformers, written).from_pretrained(folder).eval()
    apply_plan(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(sys.argv[2], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(ids[0]))
