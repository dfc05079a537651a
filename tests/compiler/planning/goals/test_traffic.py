"""The bytes that a token reads, against the weights that an artifact has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alloc_moe.compiler.export.normalize import export_model
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.planning.goals.traffic import WeightsRead, weights_read
from alloc_moe.compiler.records import Correction
from alloc_moe.compiler.rounding.formats import BITS, choose_formats, mixed_formats
from alloc_moe.compiler.rounding.weights import quantized
from alloc_moe.runtime.artifact.plan import AllocationPlan, Budget, PlannedLayer
from alloc_moe.runtime.artifact.token_sizes import TokenSizes


def stored_bytes(moe: MoeModel, dtype: str, plan: AllocationPlan) -> int:
    """Return the bytes of all weights of an artifact."""
    graph = export_model(moe, dtype=dtype)
    model = specialize(graph, plan, device="cpu", quantization=moe.quantization)
    values = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in values if tensor is not None)


def whole_bytes(moe: MoeModel, reading: WeightsRead, row: float) -> float:
    """Return the bytes of all weights, from those that a token reads.

    Args:
        moe: The model.
        reading: What a token reads.
        row: The bytes of a row of the embeddings, one of which is read.
    """
    experts = sum(
        layer.num_experts * widths[0]
        for layer, widths in zip(moe.layers, reading.experts, strict=True)
    )
    rows = len(moe.checkpoint.skeleton.get_input_embeddings().weight)
    return reading.others + experts + (rows - 1) * row


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("olmoe", "float32"), ("qwen2_moe", "int4"), ("gpt_oss", "int4")],  # the second ties its head
)
def test_with_all_experts_and_rows_it_is_what_the_artifact_has(
    checkpoint: Callable[[str], Path],
    plan_for: Callable[..., AllocationPlan],
    name: str,
    dtype: str,
) -> None:
    moe = load_model(str(checkpoint(name)))
    chosen = choose_formats(moe.checkpoint, dtype) if dtype in BITS else None
    if chosen is not None:
        moe = quantized(moe, chosen)
    reading = weights_read(moe.checkpoint, dtype=dtype, quantization=chosen)
    columns = moe.config.hidden_size
    form = None if chosen is None else chosen.weights.get("model.embed_tokens.weight")
    row = 4.0 * columns if form is None else columns * form.bits_per_weight / 8
    expected = whole_bytes(moe, reading, row)
    plan = plan_for(moe, [layer.experts_per_token for layer in moe.layers], redistribution="none")
    # A few constants of the graph come on top.
    assert 0 <= stored_bytes(moe, dtype, plan) - expected < 0.01 * expected


def layer_of(k: float) -> PlannedLayer:
    return PlannedLayer("l", 8, 4, k)


def test_counted_are_experts_that_run_in_their_width_and_shifts_where_there_are_any() -> None:
    reading = WeightsRead("int4", 1000, ((10.0, 18.0), (20.0, 36.0)), (3, 0), (4, 4), (40.0, 80.0))
    plan = AllocationPlan("m", Budget(4, 4, 8), "threshold", "keep", (layer_of(1.5), layer_of(2.5)))
    shift = Correction(np.ones(2, np.float32), np.ones((8, 2), np.float32))
    gain = dataclasses.replace(shift, bias=None)
    assert reading.counted(plan, (None, None), (0, 0)) == 1000 + 15 + 50
    assert reading.counted(plan, (shift, shift), (1, 0)) == 1000 + 1.5 * 21 + 50
    assert reading.counted(plan, (gain, None), (0, 1)) == 1000 + 15 + 90
    mapped = dataclasses.replace(reading, token_sizes=7)
    assert mapped.counted(plan, (None, None), (0, 0)) == 1000 + 15 + 50
    layers = [dataclasses.replace(layer, token_sizes=TokenSizes(1, "")) for layer in plan.layers]
    priced = dataclasses.replace(plan, layers=tuple(layers))
    assert mapped.counted(priced, (None, None), (0, 0)) == 1007 + 15 + 50
    assert (mapped.most, dataclasses.replace(mapped, dial=False).most) == (1223, 1216)
    assert reading.original == 1120
    table = reading.costs(shifted=True)
    assert table.prices[0] == (13, 26, 39, 52, 21, 42, 63, 84)
    assert table.prices[1] == (20, 40, 60, 80, 36, 72, 108, 144)
    assert reading.costs(shifted=False).cheapest == 30


def test_each_width_has_its_own_bytes(checkpoint: Callable[[str], Path]) -> None:
    moe = load_model(str(checkpoint("olmoe")))
    chosen = choose_formats(moe.checkpoint, "int4")
    formats = mixed_formats(chosen)
    mixed = weights_read(moe.checkpoint, dtype="int4", quantization=chosen, formats=formats)
    for index, dtype in enumerate(("int4", "int8")):
        alone = weights_read(
            moe.checkpoint, dtype=dtype, quantization=choose_formats(moe.checkpoint, dtype)
        )
        assert [widths[index] for widths in mixed.experts] == [row[0] for row in alone.experts]
