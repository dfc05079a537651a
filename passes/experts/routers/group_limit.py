"""Hide experts of groups that a router didn't choose in a few nodes, or in none."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from alloc_moe.passes.attention.latent import latent_caches
from alloc_moe.passes.attention.layers import constant, insert, producer, take_over
from alloc_moe.passes.base import DOMAIN, add_initializer, shared_integers

_EXPORTED = ("Not", "Cast", "Reshape", "Expand", "Unsqueeze", "ScatterElements")


@dataclass(frozen=True)
class GroupLimit:
    """A ``Where`` that hides scores [T, E] of experts outside the chosen groups.

    ``fill_number`` is what they become, zero or minus infinity. ``ids`` [T, chosen] are groups, of
    ``groups`` in all.
    """

    where: ir.Node
    fill_number: float
    scores: ir.Value
    ids: ir.Value
    groups: int

    @property
    def chosen(self) -> int:
        """How many groups a token has."""
        return _last(self.ids)


class GroupLimitPass(ir.passes.InPlacePass):
    """Replace the nodes that hide a group's experts by four, by none where all are chosen.

    The choice stays the same, ties included. Only graphs with caches of latents are changed: those
    of other families stay byte for byte what they were.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = list(_limits(model))
        for limit in found:
            if limit.chosen < limit.groups:
                _replace(model, limit)
            else:
                ir.convenience.replace_all_uses_with(limit.where.outputs[0], limit.scores)
        if found:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        left = [limit.scores.name for limit in _limits(model)]
        if left:
            raise ir.passes.PostconditionError(f"Groups of the scores {left} are still scattered.")


def _limits(model: ir.Model) -> Iterator[GroupLimit]:
    if next(latent_caches(model), None) is None:
        return
    for node in list(model.graph):
        limit = _match(node) if node.op_type == "Where" else None
        if limit is not None:
            yield limit


def _match(where: ir.Node) -> GroupLimit | None:
    hidden, fill, scores = where.inputs
    node = producer(hidden)
    for op_type in _EXPORTED:
        if node is None or node.op_type != op_type:
            return None
        last, node = node, producer(node.inputs[0])
    zeros, ids, ones = last.inputs
    if scores is None or ids is None or not (_is(zeros, 0) and _is(ones, 1)):
        return None
    number = None if fill is None else ir.convenience.get_const_tensor(fill)
    if number is None or number.size != 1 or number.numpy().item() not in (0, -np.inf):
        return None
    top = producer(ids)
    if top is None or top.op_type != "TopK" or ids is not top.outputs[1]:
        return None
    groups = _last(top.inputs[0])
    fits = groups and _last(ids) and _last(scores) % groups == 0
    return GroupLimit(where, number.numpy().item(), scores, ids, groups) if fits else None


def _is(value: ir.Value | None, number: int) -> bool:
    """Whether all of a value is one number, as an Expand or a ConstantOfShape makes it."""
    node = producer(value)
    if node is None:
        return False
    if node.op_type == "Expand":
        return constant(node.inputs[0]) == [number]
    filled = node.attributes.get("value") if node.op_type == "ConstantOfShape" else None
    return filled is not None and filled.as_tensor().numpy().tolist() == [number]


def _replace(model: ir.Model, limit: GroupLimit) -> None:
    at, experts = limit.where, _last(limit.scores)
    integers = functools.partial(shared_integers, model)
    # What is hidden becomes zero or minus infinity; the rest stays what it is, bit for bit.
    hidden, (off, on) = ("Mul", (0, 1)) if limit.fill_number == 0 else ("Add", (-np.inf, 0))
    off_on = ir.tensor(np.array([off, on], np.float32), name=f"{DOMAIN}.off_on")
    by_group = _view(limit)
    if by_group is None:
        shape = integers("by_group", 0, limit.groups, -1)
        by_group = insert(model, at, "Reshape", [limit.scores, shape]).outputs[0]
    depth = integers("groups", limit.groups)
    marks = insert(
        model,
        at,
        "OneHot",
        [limit.ids, depth, add_initializer(model, off_on)],
        {"axis": 1},
    )
    chosen = insert(model, at, "ReduceMax", [marks.outputs[0], integers("group_axis", 2)])
    kept = insert(model, at, hidden, [by_group, chosen.outputs[0]])
    flat = insert(model, at, "Reshape", [kept.outputs[0], integers("by_expert", 0, experts)])
    take_over(at.outputs[0], flat.outputs[0])


def _view(limit: GroupLimit) -> ir.Value | None:
    """Return the scores by group [T, groups, experts of one], which a router looks at itself."""
    for user in limit.scores.consumers():
        shape = user.outputs[0].shape
        sizes = (limit.groups, _last(limit.scores) // limit.groups)
        if user.op_type == "Reshape" and shape is not None and tuple(shape)[1:] == sizes:
            return user.outputs[0]
    return None


def _last(value: ir.Value | None) -> int:
    shape = None if value is None else value.shape
    size = shape[-1] if shape is not None and len(shape) else 0
    return size if isinstance(size, int) else 0
