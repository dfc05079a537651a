"""A checkpoint under its plan in plain transformers, beside the ONNX artifact of the same plan."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from alloc_moe.compiler import compile
from alloc_moe.runtime.execution.session import open_session

BUNDLED = ("tiny-moe", "tiny-qwen3-moe")
IDS = np.random.default_rng(7).integers(2, 250, (3, 11))
MASK = np.ones((3, 11), np.int64)
MASK[0, :4] = MASK[1, :1] = 0
NEXT = np.random.default_rng(8).integers(2, 250, (4, 3, 1))


@pytest.fixture
def model_of(checkpoint: Callable[[str], Path], examples: Path) -> Callable[[str], Path]:
    """Return a function from a bundled model's or a family's name to its folder."""
    return lambda name: examples / name if name in BUNDLED else checkpoint(name)


@pytest.fixture
def both(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Return a function that compiles a model into an artifact and a checkpoint of one plan."""

    def make(model: Path, **options: Any) -> tuple[Path, Path]:
        graph, folder = tmp_path / "out.onnx", tmp_path / "planned"
        given = {"tokens": 256, "profile": tmp_path / "profile.json", **options}
        plan = compile(model, output=graph, **given).plan
        other = compile(model, output=folder, target="checkpoint", **given).plan
        assert (other.layers, other.price) == (plan.layers, plan.price)
        return graph, folder

    return make


def in_transformers(model: Any) -> list[np.ndarray]:
    """Return the logits of real tokens: of a left-padded batch, then of a token at a time."""
    found, cache, mask = [], None, MASK
    for ids in (IDS, *NEXT):
        real = mask[:, -ids.shape[1] :] != 0
        with torch.inference_mode():
            output = model(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(positions(mask, ids.shape[1])),
                past_key_values=cache,
                use_cache=True,
            )
        cache = output.past_key_values
        found.append(output.logits.numpy()[real])
        mask = np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1)
    return found


def in_onnxruntime(path: Path) -> list[np.ndarray]:
    session = open_session(path, ep="cpu")
    found, cache, mask = [], session.empty_cache(3), MASK
    for ids in (IDS, *NEXT):
        output = session.run(ids, attention_mask=mask, cache=cache)
        cache = output.cache
        found.append(output.logits[mask[:, -ids.shape[1] :] != 0])
        mask = np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1)
    return found


def positions(mask: np.ndarray, new: int) -> np.ndarray:
    return (mask.cumsum(1) - 1).clip(min=0)[:, -new:]


def distance(model: Any, graph: Path) -> float:
    """Return the greatest difference of any logit."""
    pairs = zip(in_transformers(model), in_onnxruntime(graph), strict=True)
    return max(float(np.abs(own - other).max()) for own, other in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "tiny-moe",
        "deepseek_v2",
        "mixtral",
        pytest.param("tiny-qwen3-moe", marks=pytest.mark.rare),
        *(pytest.param(name, marks=pytest.mark.families) for name in ("mistral4", "nemotron_h")),
    ],
)
def test_logits_are_those_of_the_artifact(
    name: str,
    model_of: Callable[[str], Path],
    both: Callable[..., tuple[Path, Path]],
    load: Callable[[str], ModuleType],
) -> None:
    graph, folder = both(model_of(name))
    [written] = AutoConfig.from_pretrained(folder).architectures
    model = getattr(transformers, written).from_pretrained(folder).eval()
    assert distance(model, graph) > 1e-2
    load("checkpoints/planned").apply_plan(model, folder)
    assert distance(model, graph) < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"token_sizes": False, "correct": "none"},
        {"redistribute": "threshold", "weights": "renorm", "correct": "gain"},
        {"redistribute": "none", "weights": "renorm"},
        {"redistribute": "none", "allocation": "uniform", "correct": "none"},
    ],
    ids=["one size", "threshold", "k per layer", "one k"],
)
def test_other_plans_are_covered(
    options: dict[str, Any],
    checkpoint: Callable[[str], Path],
    both: Callable[..., tuple[Path, Path]],
    load: Callable[[str], ModuleType],
) -> None:
    graph, folder = both(checkpoint("olmoe"), **options)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    load("checkpoints/planned").apply_plan(model, folder)
    assert distance(model, graph) < 1e-4


@pytest.mark.parametrize(("family", "weights"), [("olmoe", "keep"), ("qwen3_moe", "renorm")])
def test_one_k_for_all_layers_needs_no_plan_but_the_configuration(
    family: str,
    weights: str,
    checkpoint: Callable[[str], Path],
    both: Callable[..., tuple[Path, Path]],
) -> None:
    options = {"redistribute": "none", "allocation": "uniform", "weights": weights}
    graph, folder = both(checkpoint(family), correct="gain", **options)
    [k] = {layer["k"] for layer in json.loads((folder / "alloc_plan.json").read_text())["layers"]}
    model = AutoModelForCausalLM.from_pretrained(folder, num_experts_per_tok=k).eval()
    assert distance(model, graph) < 1e-4


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        ({"redistribution": "batch"}, "batch"),
        ({"redistribution": "top-p"}, "top-p"),
        ({"redistribution": "price", "cap": 1.5}, "price and a --cap"),
    ],
    ids=["tokens compete", "other scores", "a cap"],
)
def test_a_plan_that_is_not_covered_is_refused(
    plan: dict[str, Any], named: str, tmp_path: Path, load: Callable[[str], ModuleType]
) -> None:
    (tmp_path / "alloc_plan.json").write_text(json.dumps({"format": 1, **plan}))
    with pytest.raises(
        ValueError, match=f"was planned with --redistribute {named}, which isn't covered here"
    ):
        load("checkpoints/planned").read_plan(tmp_path, "cpu")


def test_a_plan_that_is_damaged_or_in_force_already_is_refused(
    checkpoint: Callable[[str], Path],
    both: Callable[..., tuple[Path, Path]],
    load: Callable[[str], ModuleType],
) -> None:
    _, folder = both(checkpoint("olmoe"))
    apply_plan = load("checkpoints/planned").apply_plan
    model = AutoModelForCausalLM.from_pretrained(folder)
    file = folder / "alloc_plan.json"
    whole = file.read_text("utf-8")

    def refused(text: str, why: str) -> None:
        file.write_text(text, "utf-8")
        with pytest.raises(ValueError, match=rf"^The plan in .* can't be read, or .*{why}.*Copy"):
            apply_plan(model, folder)

    refused(whole[:300], "JSONDecodeError")
    refused("[]", "TypeError")
    refused(whole.replace('"format": 1', '"format": 2'), "format 2 is newer")
    refused(whole.replace('"sizes"', '"other"'), "KeyError: 'sizes'")
    refused(whole.replace('"sizes": [', '"sizes": [1.0, '), "9 sizes for 8 experts")
    refused(whole.replace('"price": ', '"price": -'), "the price is -")
    refused(re.sub(r'"price": [\d.e-]+', '"price": NaN', whole), "the price is nan")
    refused(re.sub(r'"sizes": \[[^,]*', '"sizes": [Infinity', whole), "a size is inf")
    refused(re.sub('"weights": "[a-z]*"', '"weights": "k"', whole), "weights are k, and no keep or")
    refused(whole.replace('"hidden": 64', '"hidden": 63'), "hidden size 63, the model's 64")
    refused(whole.replace('"values": "', '"values": "AHwAfA=='), "Error")
    for number, said in (("AHwA", "inf"), ("AH4A", "nan")):
        damaged = re.sub('"values": "....', f'"values": "{number}', whole)
        refused(damaged, f"a token size is {said}")
    refused(whole.replace("layers.1.mlp.experts", "layers.9.mlp.experts"), "AttributeError")
    shifts = folder / "alloc_plan.safetensors"
    tensors = load_file(shifts)
    save_file({name: tensor[:, :-1].contiguous() for name, tensor in tensors.items()}, shifts)
    refused(whole, r"a shift of \(8, 63\) is no \(8, 64\) finite numbers")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, shifts)
    refused(whole, r"a shift of \(8, 64\) is no")
    save_file(tensors, shifts)
    shifts.write_bytes(shifts.read_bytes()[:100])
    refused(whole, "SafetensorError")
    shifts.unlink()
    refused(whole, "FileNotFoundError")

    file.write_text(whole.replace(f'"shifts": "{shifts.name}"', '"shifts": null'), "utf-8")
    apply_plan(model, folder)
    with pytest.raises(ValueError, match="runs under a plan already"):
        apply_plan(model, folder)


@pytest.mark.parametrize(
    ("redistribution", "given", "named"),
    [
        ("threshold", float("nan"), "a threshold is nan"),
        ("none", 9, "k is 9 in a layer of 8 experts"),
        ("none", 0, "k is 0 in a layer"),
        ("none", "3", "k is '3' in a layer"),
        ("price", [1.0] * 7, "7 sizes for 8 experts"),
    ],
)
def test_what_can_not_decide_is_refused(
    redistribution: str, given: Any, named: str, load: Callable[[str], ModuleType]
) -> None:
    planned = load("checkpoints/planned")
    layer = {"experts": 8, planned.DECIDES[redistribution]: given}
    with pytest.raises(ValueError, match=named):
        planned.check_layer(layer, redistribution)
