"""Write the graphs that run.py measures, without their weights: for any CPU, no GPU.

    python examples/benchmarks/gpu/make.py -o graphs/
    python examples/benchmarks/gpu/make.py -o graphs/ --only olmoe

Every model gets a JSON file beside its graphs, which says what random data the weights are. They
are made where they are needed: graphs of tens of gigabytes travel as some hundred kilobytes. Needs
the extra [compile], takes a few minutes, and downloads nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from cases import LARGE, SMALL, Case, tiny
from transformers import AutoConfig

sys.path.append(str(Path(__file__).parents[1] / "speed"))
from random_artifact import random_checkpoint

from alloc_moe.compiler.export.graph import export_graph
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.records import MoeLayer, Quantization
from alloc_moe.compiler.rounding.formats import BITS, choose_formats
from alloc_moe.compiler.verify.exact import keep_activations
from alloc_moe.passes.default import normalize_passes
from alloc_moe.runtime.artifact.plan import GENERATION_KEY, AllocationPlan, Budget, PlannedLayer
from alloc_moe.runtime.artifact.token_sizes import TokenSizes

_INLINE = 256  # up to so many bytes a weight is in the graph itself
# Not weights: put into the graph as they are.
_COMPUTED = re.compile(r"rotary|cosine|sine|keys_of_all_heads")
_ROUTER = re.compile(r"\.gate\.weight|router")
_ROUTER_LOGITS = 2.7  # their standard deviation: a trained router is as decisive
_DIVISORS = {"full": 1, "half": 2, "quarter": 4, "batch": 2}
_SPREAD = 0.2  # norms and scales differ by so much either way
_EXPERTS, _EMBEDDINGS = {"MoE", "QMoE"}, {"Gather", "GatherBlockQuantized"}


def write_case(case: Case, folder: Path) -> None:
    """Write a model's graphs and its description."""
    config = AutoConfig.for_model(**case.settings)
    checkpoint = random_checkpoint(config)
    device: Literal["cuda"] = "cuda"
    form = choose_formats(checkpoint, case.dtype, device=device) if case.dtype in BITS else None
    graph = export_graph(checkpoint, dtype=form.activations if form else case.dtype)
    normalize_passes(form.weights if form else {})(graph)
    length = {"eos_token_id": None, "context_length": config.max_position_embeddings}
    graph.metadata_props[GENERATION_KEY] = json.dumps(length)
    store = _Store(f"{case.name}.data", config.hidden_size)
    described: dict[str, Any] = {}
    for plan in case.plans:
        wanted = make_plan(checkpoint.layers, plan, form, hidden=config.hidden_size)
        model = specialize(graph, wanted, quantization=form, device=device)
        if case.is_small:  # it is compared with the CPU
            keep_activations(model)
        store.detach(model, folder)
        path = folder / f"{case.name}-{plan}.onnx"
        ir.save(model, path)
        described[plan] = {"file": path.name, **active_bytes(model)}
    sizes = [(layer.num_experts, layer.experts_per_token) for layer in checkpoint.layers]
    description = {
        "name": case.name,
        "dtype": case.dtype,
        "vocabulary": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "hidden": config.hidden_size,
        "layers": [{"experts": experts, "k": k} for experts, k in sizes],
        "settings": case.settings,
        "plans": described,
        "data": {"file": store.name, "bytes": store.end, "tensors": store.tensors},
    }
    (folder / f"{case.name}.json").write_text(json.dumps(description), "utf-8")


def make_plan(
    layers: Sequence[MoeLayer], plan: str, form: Quantization | None, *, hidden: int
) -> AllocationPlan:
    """Return a plan by its name in `Case`; a dial begins with all experts."""
    trained = sum(layer.experts_per_token for layer in layers)
    priced = plan == "price"
    divisor = _DIVISORS.get(plan, 1)
    planned = tuple(
        PlannedLayer(
            layer.name,
            layer.num_experts,
            layer.experts_per_token,
            max(layer.experts_per_token // divisor, 1),
            sizes=tuple(1.0 + 0.1 * (e % 3) for e in range(layer.num_experts)) if priced else None,
            token_sizes=token_sizes(hidden, layer.num_experts) if priced else None,
        )
        for layer in layers
    )
    kept = sum(layer.k for layer in planned)
    return AllocationPlan(
        source="random weights",
        budget=Budget(kept / trained, kept, trained),
        redistribution={"price": "price", "batch": "batch"}.get(plan, "none"),
        weights="keep",
        layers=planned,
        price=0.0 if priced else None,
        overlap=0.5 if priced else None,
        quantization=form.to_plan() if form else {},
    )


def token_sizes(hidden: int, experts: int) -> TokenSizes:
    """Return maps that multiply sizes by about 0.8 to 1.2, and are short if compressed."""
    columns, rows = np.meshgrid(np.arange(experts), np.arange(hidden))
    matrix = ((7 * rows + 3 * columns) % 11 - 5) / (16 * math.sqrt(hidden))
    return TokenSizes.of(matrix, np.zeros(experts))


class _Store:
    """Where the weights of a model's graphs will lie: those of one name, in one place."""

    def __init__(self, name: str, hidden: int) -> None:
        self.name, self.end = name, 0
        self.tensors: list[dict[str, Any]] = []
        self._hidden = hidden
        self._placed: dict[tuple[Any, ...], int] = {}

    def detach(self, model: ir.Model, folder: Path) -> None:
        """Replace a graph's weights by references; what is no weight becomes part of it."""
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes <= _INLINE:
                    continue
                name = value.name or ""
                if not isinstance(tensor, ir.LazyTensor) or _COMPUTED.search(name):
                    value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
                    continue
                shape = [*tensor.shape.numpy()]
                value.const_value = ir.ExternalTensor(
                    self.name,
                    self._place(name, tensor.dtype, shape, tensor.nbytes),
                    tensor.nbytes,
                    tensor.dtype,
                    shape=ir.Shape(shape),
                    name=name,
                    base_dir=folder,
                )

    def _place(self, name: str, dtype: ir.DataType, shape: list[int], size: int) -> int:
        key = (name, dtype, *shape)
        if key not in self._placed:
            fill = filling(name, dtype, shape, hidden=self._hidden)
            place = {"offset": self.end, "bytes": size, "type": dtype.name}
            self.tensors.append({"name": name, "shape": shape, **place, **fill})
            self._placed[key] = self.end
            self.end += -(-size // 4096) * 4096
        return self._placed[key]


def filling(name: str, dtype: ir.DataType, shape: list[int], *, hidden: int) -> dict[str, float]:
    """Return what random data a weight is: ``std`` of normals, or a range ``low`` to ``high``.

    Nothing for packed integers, which are random bytes.
    """
    if dtype in (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT4, ir.DataType.INT4):
        return {}
    std = 1 / math.sqrt(hidden)
    if name.endswith(".scales"):
        bits = 4 if ".int4" in name else 8
        middle = std / ((1 << bits) / math.sqrt(12))
    elif len(shape) == 1 and "norm" in name:
        middle = 1.0
    else:
        return {"std": _ROUTER_LOGITS * std if _ROUTER.search(name) else std}
    return {"low": middle * (1 - _SPREAD), "high": middle * (1 + _SPREAD)}


def active_bytes(model: ir.Model) -> dict[str, int]:
    """Return the bytes of all experts, and of other weights that every token reads in full."""
    experts = others = 0
    for value in model.graph.initializers.values():
        if not isinstance(value.const_value, ir.ExternalTensor):
            continue
        users = {use.node.op_type for use in value.uses()}
        if users & _EXPERTS:
            experts += value.const_value.nbytes
        elif not users <= _EMBEDDINGS:
            others += value.const_value.nbytes
    return {"expert_bytes": experts, "other_bytes": others}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", help="Names of models, with commas between; by default all.")
    parser.add_argument("--tiny", action="store_true", help="Tiny models, to try the script out.")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    chosen = given.only.split(",") if given.only else None
    for each in (*LARGE, *SMALL):
        if chosen is None or each.name in chosen:
            start = time.perf_counter()
            try:
                write_case(tiny(each) if given.tiny else each, given.output)
            except Exception as error:  # the others are written all the same
                print(f"{each.name}: {type(error).__name__}: {error}", flush=True)
            else:
                print(f"{each.name}: {time.perf_counter() - start:.1f} s", flush=True)
