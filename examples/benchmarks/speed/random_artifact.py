"""Write an artifact of a real model's shape with random weights, for measuring speed.

    python examples/benchmarks/speed/random_artifact.py olmoe-1b-7b -o olmoe.onnx --also none batch

What it says means nothing, but it reads, computes and routes as the real one does: no weights are
downloaded, and never more than one is in memory. Its plan keeps the mean activations of the budgets
in its dial, which were measured on the random tokens that contenders run: with random weights, what
a price keeps differs from text to text.

With --no-data no weight is made: a machine with a GPU fills them in by itself,

    python random_artifact.py olmoe-1b-7b -o olmoe.onnx --device cuda --dtype float16 --no-data
    python random_models/without_data.py olmoe.onnx.weights.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from contenders.protocol import SEED
from random_models.olmoe import configuration
from random_models.shapes import SHAPES
from random_models.without_data import save_without_data
from transformers import AutoConfig, PreTrainedConfig

sys.path.append(str(Path(__file__).parents[2] / "checkpoints"))
from full_size import MODELS

from alloc_moe.compiler.export.graph import export_graph
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.checkpoint import Checkpoint
from alloc_moe.compiler.model.moe_layers import find_moe_layers
from alloc_moe.compiler.model.skeleton import build_skeleton
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.records import Device, MoeLayer, Quantization
from alloc_moe.compiler.rounding.formats import BITS, choose_formats
from alloc_moe.passes.default import normalize_passes
from alloc_moe.runtime.artifact.plan import (
    GENERATION_KEY,
    PLAN_KEY,
    AllocationPlan,
    Budget,
    DialPoint,
    PlannedLayer,
)
from alloc_moe.runtime.execution.session import open_session

_CACHE_STEP = 0.05  # of an int8 cache; random keys and values are about 1
FRACTIONS = (0.75, 0.5, 0.375, 0.25)


class RandomReader:
    """Gives random weights where a checkpoint's reader gives the trained ones."""

    def __init__(self, model: Any) -> None:
        self._shapes = {name: value.shape for name, value in model.state_dict().items()}

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight `name`, the same every time."""
        shape = self._shapes[name]
        if len(shape) == 1:  # a norm's
            return torch.ones(shape, dtype=dtype)
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        # Routers are as decisive as trained ones: their best experts get most of the weight.
        scale = 0.06 if ".gate." in name else 0.02
        return torch.randn(shape, generator=random).mul_(scale).to(dtype)


def shaped(name: str, *, layers: int | None) -> PreTrainedConfig:
    """Return the configuration of a shape, or of a model of ``full_size.py``, with fewer layers."""
    if name in SHAPES:
        shape = SHAPES[name]
        return configuration(dataclasses.replace(shape, layers=layers or shape.layers))
    settings = dict(MODELS[name])
    return AutoConfig.for_model(
        **{**settings, "num_hidden_layers": layers or settings["num_hidden_layers"]}
    )


def random_checkpoint(config: PreTrainedConfig) -> Checkpoint:
    """Return a checkpoint that is nowhere on disk, and has no tokenizer."""
    skeleton = build_skeleton(config, torch.float32)
    reader: Any = RandomReader(skeleton)
    no_tokenizer: Any = None
    return Checkpoint(
        source="random weights",
        folder=Path(),
        fingerprint="",
        config=config,
        tokenizer=no_tokenizer,
        skeleton=skeleton,
        layers=find_moe_layers(skeleton),
        reader=reader,
    )


def write(
    config: PreTrainedConfig,
    path: Path,
    *,
    dtype: str,
    block: int,
    cache: str,
    also: Sequence[str],
    device: Device = "cpu",
    data: bool = True,
) -> None:
    """Write an artifact with a dial, and one of other redistributions at half of its activations.

    All share the data of the first; so does one with a float32 cache. Without data there is no
    dial, as nothing can be measured: bind a price.
    """
    checkpoint = random_checkpoint(config)
    layers = checkpoint.layers
    form = choose_formats(checkpoint, dtype, block=block, device=device) if dtype in BITS else None
    graph = export_graph(checkpoint, dtype=form.activations if form else dtype)
    normalize_passes(form.weights if form else {})(graph)
    context = {"eos_token_id": None, "context_length": config.max_position_embeddings}
    graph.metadata_props[GENERATION_KEY] = json.dumps(context)
    shape = (config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    steps = np.full(shape, _CACHE_STEP, np.float32)
    scales = dict.fromkeys(range(config.num_hidden_layers), (steps, steps))

    def specialized(policy: str, cache: str = cache) -> ir.Model:
        return specialize(
            graph,
            make_plan(layers, policy, form),
            device=device,
            quantization=form,
            cache_scales=scales if cache == "int8" else {},
        )

    if not data:
        others = {path.with_name(f"{path.stem}-{policy}.onnx"): policy for policy in also}
        save_without_data({to: specialized(p) for to, p in {path: "price", **others}.items()})
        return
    package.save_graph(specialized("price"), path)
    written = ir.load(path).graph.initializers
    plan = _with_dial(path, make_plan(layers, "price", form), config.vocab_size)
    package.stamp(path, plan)
    for policy in also:
        model = specialized("price", "float32") if "cache" in policy else specialized(policy)
        if "cache" in policy:
            model.metadata_props[PLAN_KEY] = plan.to_json()
        for name, value in model.graph.initializers.items():
            if name in written:
                value.const_value = written[name].const_value
        ir.save(model, path.with_name(f"{path.stem}-{policy}.onnx"))


def make_plan(layers: Sequence[MoeLayer], policy: str, form: Quantization | None) -> AllocationPlan:
    """Return a plan for half of the experts in every layer, for all, or for a dial from all."""
    trained = sum(layer.experts_per_token for layer in layers)
    priced = policy == "price"  # at price 0 all run; the dial turns it down
    all_run = priced or policy == "full"
    planned = tuple(
        PlannedLayer(
            layer.name,
            layer.num_experts,
            layer.experts_per_token,
            layer.experts_per_token if all_run else layer.experts_per_token // 2,
            sizes=(1.0,) * layer.num_experts if priced else None,
        )
        for layer in layers
    )
    return AllocationPlan(
        source="random weights",
        budget=Budget(1.0, trained, trained) if all_run else Budget(0.5, trained // 2, trained),
        redistribution="none" if policy == "full" else policy,
        weights="keep",
        layers=planned,
        price=0.0 if priced else None,
        overlap=0.5 if priced else None,
        quantization=form.to_plan() if form else {},
    )


def _with_dial(path: Path, plan: AllocationPlan, vocabulary: int) -> AllocationPlan:
    """Return the plan with the prices at which contenders run each fraction of the experts."""
    session = open_session(path, ep="cpu", count_activations=True)
    tokens = np.random.default_rng(SEED).integers(0, vocabulary, (1, 512))

    def mean(price: float) -> float:
        return sum(session.run(tokens, price=price).activations or ()) / tokens.size

    points = []
    for fraction in FRACTIONS:
        wanted, low, high = fraction * plan.budget.original, 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (low, middle) if mean(middle) <= wanted else (middle, high)
        points.append(DialPoint(wanted, high))
    return dataclasses.replace(plan, dial=tuple(points))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=[*SHAPES, *MODELS])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--dtype", default="int4")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--layers", type=int, help="Fewer layers than the real model has.")
    parser.add_argument("--cache", default="float32", choices=["float32", "int8"])
    parser.add_argument(
        "--also", nargs="*", default=[], choices=["none", "full", "batch", "float32-cache"]
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--no-data", action="store_true", help="Graphs only, and a list of weights."
    )
    given = parser.parse_args()
    made = shaped(given.shape, layers=given.layers)
    options = {"dtype": given.dtype, "block": given.block, "cache": given.cache}
    write(
        made,
        given.output,
        **options,
        also=given.also,
        device=given.device,
        data=not given.no_data,
    )
