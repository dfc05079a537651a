"""Group-limited routing in a few nodes, against what is exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from alloc_moe.passes.base import add_initializer
from alloc_moe.passes.experts.routers.group_limit import GroupLimitPass

Run = Callable[..., Any]
EXPERTS, GROUPS = 8, 4


def router(*, chosen: int = 2, latent: bool = True, fill: float = 0.0, scattered: int = 1) -> Any:
    """Return a router that takes the best of each group, as exported, beside a cache."""
    cache = "ScatterND(past_key_values.0.key, places, new)" if latent else "Neg(new)"
    text = f"""
<ir_version: 10, opset_import: ["" : 23]>
g (float[t, {EXPERTS}] scores, float[b, 1, p, 3] past_key_values.0.key, int64[b, s, 3] places,
   float[b, s, 3] new)
 => (float[t, 3] weights, int64[t, 3] ids, float[b, 1, p, 3] cache)
<int64[3] by_group = {{-1, {GROUPS}, {EXPERTS // GROUPS}}}, int64[1] axis2 = {{2}},
 int64[1] chosen = {{{chosen}}}, float zero = {{0}}, int64[1] last = {{-1}},
 int64[2] flat = {{-1, {EXPERTS}}}, int64[3] wide = {{1, 1, {EXPERTS // GROUPS}}},
 int64[1] k = {{3}}>
{{
  view = Reshape(scores, by_group)
  best = ReduceMax<keepdims=0>(view, axis2)
  values, groups = TopK<axis=-1>(best, chosen)
  shape = Shape(best)
  none = Expand(zero, shape)
  taken = Shape(groups)
  some = ConstantOfShape<value = float[1] {{{scattered}}}>(taken)
  marks = ScatterElements<axis=1>(none, groups, some)
  marks3 = Unsqueeze(marks, last)
  expanded = Expand(marks3, wide)
  mask = Reshape(expanded, flat)
  seen = Cast<to=9>(mask)
  hidden = Not(seen)
  unfilled = Identity(zero)
  limited = Where(hidden, unfilled, scores)
  weights, ids = TopK<axis=-1>(limited, k)
  cache = {cache}
}}
"""
    text = text.replace("past_key_values.0.key", "past_key_values__0__key")
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True)
    model = ir.from_proto(proto)
    named = {value.name: value for node in model.graph for value in node.inputs}
    filled = add_initializer(model, ir.tensor(np.array(fill, np.float32), name="fill"))
    ir.convenience.replace_all_uses_with(named["unfilled"], filled)
    for value in model.graph.inputs:
        value.name = (value.name or "").replace("__", ".")
    return model


def given(rng: np.random.Generator) -> dict[str, Any]:
    """Return scores with ties between groups and within, and a cache that has room."""
    return {
        "scores": rng.integers(-3, 3, (64, EXPERTS)).astype(np.float32),
        "past_key_values.0.key": np.zeros((1, 1, 1, 3), np.float32),
        "places": np.zeros((1, 1, 3), np.int64),
        "new": np.ones((1, 1, 3), np.float32),
    }


@pytest.mark.parametrize("fill", [-np.inf, 0.0])
@pytest.mark.parametrize("chosen", [1, 2, GROUPS])
def test_the_choice_stays_the_same(
    run: Run, rng: np.random.Generator, chosen: int, fill: float
) -> None:
    model, inputs = router(chosen=chosen, fill=fill), given(rng)
    before = run(model, inputs)
    assert GroupLimitPass()(model).modified
    for old, new in zip(before, run(model, inputs), strict=True):
        np.testing.assert_array_equal(new, old)


def test_four_nodes_are_left_and_none_where_all_groups_are_chosen() -> None:
    hiding_nodes = ["OneHot", "ReduceMax", "Mul", "Reshape"]
    for chosen, hiding in ((2, hiding_nodes), (GROUPS, [])):
        model = router(chosen=chosen)
        GroupLimitPass()(model)
        groups = ["Reshape", "ReduceMax", "TopK"] if hiding else []
        expected = [*groups, *hiding, "TopK", "ScatterND"]
        assert [node.op_type for node in model.graph] == expected


def test_a_second_run_changes_nothing() -> None:
    model = router()
    GroupLimitPass()(model)
    assert not GroupLimitPass()(model).modified


def test_what_is_left_is_reported() -> None:
    with pytest.raises(ir.passes.PostconditionError, match=r"'scores'\] are still scattered"):
        GroupLimitPass().ensures(router())


@pytest.mark.parametrize("other", [{"latent": False}, {"scattered": 0}, {"fill": -1.0}], ids=str)
def test_other_graphs_are_left_alone(other: dict[str, Any]) -> None:
    assert not GroupLimitPass()(router(**other)).modified
