"""Rows for an operator with k = 1: redirected for a few tokens, compacted for more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from alloc_moe.passes.base import DOMAIN, MICROSOFT, add_function
from alloc_moe.passes.experts.redirect import route_rows

CANDIDATES, EXPERTS, FEW = 3, 6, 4
DROPPED, SPARE = -1e4, -9e3
Run = Callable[..., list[NDArray[Any]]]


def routing() -> ir.Model:
    inputs = [
        ir.val("weights", ir.DataType.FLOAT, ["t", CANDIDATES]),
        ir.val("ids", ir.DataType.INT64, ["t", CANDIDATES]),
        ir.val("keep", ir.DataType.BOOL, ["t", CANDIDATES]),
    ]
    attributes = {
        "candidates": CANDIDATES,
        "experts": EXPERTS,
        "dropped": DROPPED,
        "spare": SPARE,
        "few": FEW,
    }
    node = ir.node(
        route_rows.name, inputs, attributes=attributes, domain=DOMAIN, num_outputs=4, name="rows"
    )
    types = [ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.FLOAT]
    for number, (value, dtype) in enumerate(zip(node.outputs, types, strict=True)):
        value.name, value.type = f"out{number}", ir.TensorType(dtype)
    opsets = {"": 23, MICROSOFT: 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports=opsets)
    model = ir.Model(graph, ir_version=10)
    add_function(model, route_rows)
    return model


@pytest.mark.parametrize("tokens", [1, FEW, FEW + 1, 11])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_every_kept_candidate_has_a_row_of_its_expert(run: Run, tokens: int, share: float) -> None:
    random = np.random.default_rng(tokens)
    weights = random.random((tokens, CANDIDATES), np.float32)
    ids = np.stack([random.permutation(EXPERTS)[:CANDIDATES] for _ in range(tokens)])
    keep = random.random((tokens, CANDIDATES)) < share
    given = {"weights": weights, "ids": ids, "keep": keep}
    token, probabilities, slots, shares = run(routing(), given)
    np.testing.assert_array_equal(shares, np.where(keep, weights, 0))
    assert len(token) == (
        keep.size if tokens <= FEW else max(keep[1:].sum() + keep[0, 1:].sum(), 0) + 1
    )
    assert (probabilities > DROPPED / 2).sum() == keep.sum()
    for row, rank in np.argwhere(keep):
        slot = slots[row, rank]
        assert token[slot] == row
        assert probabilities[slot].argmax() == ids[row, rank]
    # What is dropped points at its own token: no other one's numbers reach it.
    best = keep[:, 0]
    np.testing.assert_array_equal(token[slots][best], np.arange(tokens)[best, None].repeat(3, 1))
