"""What the bytes of a graph's weights depend on, and so the key of an unfinished file."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.package import weights as weights_file
from alloc_moe.compiler.package.weights import (
    weights_key,
)
from alloc_moe.compiler.records import Quantization
from alloc_moe.passes.base import lazy_tensor
from alloc_moe.passes.blockwise import BlockFormat
from alloc_moe.runtime.artifact.plan import AllocationPlan

Change = Callable[[MoeModel, AllocationPlan], tuple[MoeModel, AllocationPlan, Sequence[object]]]


@pytest.fixture
def plan(
    moe_model: Callable[[str], MoeModel], plan_for: Callable[..., AllocationPlan]
) -> AllocationPlan:
    return plan_for(moe_model("olmoe"), [2, 3, 1])


def small_graph() -> ir.Model:
    """Return a graph with a lazy weight."""
    shape = [1000]
    tensor = lazy_tensor(lambda: np.zeros(shape, np.float32), shape, ir.DataType.FLOAT, "w0")
    weight = ir.val("w0", ir.DataType.FLOAT, shape, const_value=tensor)
    node = ir.node("Identity", [weight])
    [output] = node.outputs
    output.name, output.type, output.shape = "y", weight.type, weight.shape
    graph = ir.Graph([], [output], nodes=[node], initializers=[weight], opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


NOTHING: Sequence[object] = [np.zeros(3)]
FORMS = Quantization("int4", "float32", {}, (BlockFormat(4, 32),))


def other_checkpoint(moe: MoeModel) -> MoeModel:
    return dataclasses.replace(moe, checkpoint=dataclasses.replace(moe.checkpoint, fingerprint="1"))


CHANGES: dict[str, Change] = {
    "plan": lambda moe, plan: (moe, dataclasses.replace(plan, versions={"torch": "0"}), NOTHING),
    "correction": lambda moe, plan: (moe, plan, [np.float32([0, 0, 1e-9])]),
    "checkpoint": lambda moe, plan: (other_checkpoint(moe), plan, NOTHING),
    "rounding": lambda moe, plan: (dataclasses.replace(moe, quantization=FORMS), plan, NOTHING),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_bytes_depend_on_changes_the_key(
    exported: Callable[[str], ir.Model],
    moe_model: Callable[[str], MoeModel],
    plan: AllocationPlan,
    change: str,
) -> None:
    def key(moe: MoeModel, plan: AllocationPlan, inputs: Sequence[object]) -> str:
        return weights_key(specialize(exported("olmoe"), plan, device="cpu"), moe, inputs)

    moe = moe_model("olmoe")
    assert key(moe, plan, NOTHING) == key(moe, plan, [np.zeros(3)])
    assert key(*CHANGES[change](moe, plan)) != key(moe, plan, NOTHING)


def test_values_in_memory_and_files_and_code_change_the_key(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "copy"))
    shard = folder / "model.safetensors"
    moe = load_model(str(folder))
    graph = small_graph()
    keys = [weights_key(graph, moe, [])]
    graph.graph.initializers["w0"].const_value = ir.Tensor(np.ones(1000, np.float32), name="w0")
    keys.append(weights_key(graph, moe, []))
    graph.graph.initializers["w0"].const_value = ir.Tensor(np.zeros(1000, np.float32), name="w0")
    keys.append(weights_key(graph, moe, []))
    os.utime(shard, ns=(1, 1))
    keys.append(weights_key(graph, moe, []))
    monkeypatch.setattr(weights_file, "_code", lambda: "other code")
    keys.append(weights_key(graph, moe, []))
    assert len(set(keys)) == 5
