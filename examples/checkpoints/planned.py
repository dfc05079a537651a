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
import math
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
WEIGHTS = ("keep", "renorm")
LIMIT = 2.5
"""The greatest logarithm of what a token multiplies a size by, up or down."""


class NotCoveredError(ValueError):
    """What a plan asks for isn't covered here."""


def apply_plan(model: Any, folder: Path) -> None:
    """Let a model that was loaded from the folder run the experts that the plan beside it keeps.

    Raises:
        ValueError: It can't: the plan is damaged, another model's, or isn't covered here.
    """
    device, hidden = str(model.device), model.config.get_text_config().hidden_size
    try:
        plan, shifts = read_plan(folder, device)
        layers = plan["layers"]
        modules = [model.get_submodule(layer["experts_module"]) for layer in layers]
        for layer in layers:
            check_layer(layer, plan["redistribution"])
            layer["token_sizes"] = token_sizes(layer, hidden, device)
        found = [shift_of(shifts, layer, hidden) for layer in layers]
    except (
        *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError),
        SafetensorError,
    ) as error:
        if isinstance(error, NotCoveredError):
            raise
        raise ValueError(
            f"The plan in {folder} can't be read, or is another model's "
            f"({type(error).__name__}: {error}). Copy the folder again, or compile it again."
        ) from error
    if any(getattr(experts.forward, "func", None) is run_planned for experts in modules):
        raise ValueError("The model runs under a plan already. Load it again for another.")
    for experts, layer, shift in zip(modules, layers, found, strict=True):
        experts.forward = functools.partial(run_planned, experts.forward, plan, layer, shift)


def read_plan(folder: Path, device: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the plan and the shifts beside a checkpoint, when what runs them is there."""
    plan = json.loads((Path(folder) / "alloc_plan.json").read_text("utf-8"))
    if plan["format"] != 1:
        raise ValueError(f"format {plan['format']} is newer than this program")
    decides = DECIDES.get(plan["redistribution"])
    if decides is None or "cap" in plan:
        raise NotCoveredError(
            f"{folder} was planned with --redistribute {plan['redistribution']}"
            f"{' and a --cap' * ('cap' in plan)}, which isn't covered here. Compile it with price, "
            "threshold or none and no --cap, or an artifact, without --target."
        )
    if decides == "sizes":
        check_numbers("the price", [plan["price"]])
        check_numbers("the overlap", [plan.get("overlap", 0.0)])
    if plan["weights"] not in WEIGHTS:
        raise ValueError(f"weights are {plan['weights']}, and no {' or '.join(WEIGHTS)}")
    shifts = plan["checkpoint"].get("shifts")
    return plan, load_file(Path(folder) / shifts, device=device) if shifts else {}


def check_layer(layer: Any, redistribution: str) -> None:
    """Raise ValueError unless what decides in a layer is numbers that can."""
    decides, experts = layer[DECIDES[redistribution]], layer["experts"]
    if redistribution == "price":
        if len(decides) != experts:
            raise ValueError(f"{len(decides)} sizes for {experts} experts")
        check_numbers("a size", decides)
    elif redistribution == "threshold":
        check_numbers("a threshold", [decides], least=-math.inf)
    elif not isinstance(decides, int) or not 1 <= decides <= experts:
        raise ValueError(f"k is {decides!r} in a layer of {experts} experts")


def check_numbers(name: str, numbers: list[float], *, least: float = 0.0) -> None:
    """Raise ValueError for the first that is none, or is less."""
    for number in numbers:
        if not (math.isfinite(number) and number >= least):
            raise ValueError(f"{name} is {number}")


def token_sizes(layer: Any, hidden: int, device: str) -> torch.Tensor | None:
    """Return what makes a layer's sizes a token's own [hidden + 1, experts]: a bias is last."""
    given = layer.get("token_sizes")
    if given is None:
        return None
    numbers = bytearray(base64.b64decode(given["values"], validate=True))
    flat = torch.frombuffer(numbers, dtype=torch.float16).to(device, torch.float32)
    if given["hidden"] != hidden:
        raise ValueError(f"token sizes are of hidden size {given['hidden']}, the model's {hidden}")
    if not flat.isfinite().all():
        raise ValueError(f"a token size is {flat[~flat.isfinite()][0].item()}")
    return flat.view(hidden + 1, layer["experts"])


def shift_of(shifts: dict[str, torch.Tensor], layer: Any, hidden: int) -> torch.Tensor | None:
    """Return what a layer's experts add besides [experts, hidden], if they do."""
    shift, expected = shifts.get(f"{layer['experts_module']}.shift"), (layer["experts"], hidden)
    if shift is not None and (shift.shape != expected or not shift.isfinite().all()):
        raise ValueError(f"a shift of {(*shift.shape,)} is no {expected} finite numbers")
    return shift


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
    try:
        apply_plan(model, folder)
    except ValueError as error:
        sys.exit(str(error))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(sys.argv[2], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(ids[0]))
