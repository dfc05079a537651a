"""What a router computes between its product and the candidates that it names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import onnx_ir as ir

from alloc_moe.passes.step.matching import (
    NotExpressibleError,
    argument,
    constant,
    integer,
    past,
    past_casts,
    past_reshapes,
    producer,
    scalar,
    sizes,
    weight_name,
)
from alloc_moe.passes.step.parts import Groups, Router

_SCORES = {"Softmax": "softmax", "Sigmoid": "sigmoid"}


@dataclass(frozen=True)
class Matched:
    """A router, and the logits [T, E] that it begins with."""

    router: Router
    logits: ir.Value


def match_router(experts: ir.Node) -> Matched:
    """Return how the candidates of a RoutedExperts node are chosen and weighted.

    Raises:
        NotExpressibleError: It does something that a step program has no words for.
    """
    ids, weights = experts.inputs[1:3]
    top = producer(past(ids, "Cast", "Identity"), "TopK")
    if top is None or not _is_top(top) or ids is None:
        raise NotExpressibleError("its router chooses experts by more than one TopK")
    found = _weights(experts, weights, top)
    base, kinds = found.base, found.router
    selected, groups = _groups(top.inputs[0])
    selected, bias = _selection_bias(selected)
    scored = past_casts(selected)
    score = producer(scored, *_SCORES)
    if found.after_top_k:
        if bias is not None or groups is not None or scored is None:
            raise NotExpressibleError("its router takes the softmax of a biased choice")
        kinds = dataclasses.replace(kinds, score="softmax_after_top_k")
        logits: ir.Value | None = scored
    elif score is None or (base is not None and past_casts(base) is not scored):
        raise NotExpressibleError("its router weights experts by other scores than it chooses by")
    else:
        kinds, logits = dataclasses.replace(kinds, score=_SCORES[score.op_type]), score.inputs[0]
        if score.op_type == "Softmax" and integer(score, "axis", -1) not in (-1, 1):
            raise NotExpressibleError("its router takes a softmax over tokens")
    candidates = sizes(ids)[-1] if sizes(ids) else None
    if candidates is None or logits is None:
        raise NotExpressibleError("its router has no fixed number of candidates")
    top_logits = past_casts(logits)
    assert top_logits is not None
    kinds = dataclasses.replace(
        kinds,
        top_k=candidates,
        selection_bias=bias,
        groups=groups,
        rounded_logits=top_logits.dtype != ir.DataType.FLOAT,
    )
    return Matched(kinds, top_logits)


@dataclass(frozen=True)
class _Weights:
    """The chain from a TopK to weights; ``base`` are the scores they are gathered from, if any."""

    router: Router
    base: ir.Value | None
    after_top_k: bool


def _weights(experts: ir.Node, weights: ir.Value | None, top: ir.Node) -> _Weights:
    """Walk from the weights back to the TopK, or to what is gathered by its indices."""
    half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    rounded = weights is not None and weights.dtype in half
    router = Router(0, "", rounded=rounded)
    after_top_k, base = False, None
    while weights is not top.outputs[0]:
        node = None if weights is None else weights.producer()
        if node is None:
            raise NotExpressibleError("its router's weights don't come of its scores")
        first, second = argument(node, 0), argument(node, 1)
        match node.op_type:
            case "Cast" | "Identity":
                weights = first
            case "Mul" if (factor := scalar(second)) is not None:
                router, weights = dataclasses.replace(router, scale=router.scale * factor), first
            case "Div" if (factor := scalar(second)) is not None:
                router, weights = dataclasses.replace(router, scale=router.scale / factor), first
            case "Div" if not router.renormalize and (eps := _sum_of(second, first)) is not None:
                router = dataclasses.replace(router, renormalize=True, renormalize_eps=eps)
                weights = first
            case "Softmax" if integer(node, "axis", -1) in (-1, 1) and not router.renormalize:
                after_top_k, weights = True, first
            case "GatherElements" if _chosen(second) is top and integer(node, "axis", 0) in (-1, 1):
                base = first
                break
            case _:
                raise NotExpressibleError(f"its router's weights go through {node.op_type}")
    return _Weights(router, base, after_top_k)


def _sum_of(value: ir.Value | None, terms: ir.Value | None) -> float | None:
    """Return e where `value` is the sum of a row's `terms` + e."""
    value, terms = past_casts(value), past_casts(terms)
    eps = 0.0
    if (node := producer(value, "Add")) is not None:
        first, second = node.inputs
        if (given := scalar(second)) is None and (given := scalar(first)) is not None:
            first = second
        if given is None:
            return None
        eps, value = given, past_casts(first)
    total = producer(value, "ReduceSum")
    axes = None if total is None else constant(argument(total, 1))
    if total is None or axes is None or axes.tolist() not in ([-1], [1]):
        return None
    return eps if past_casts(total.inputs[0]) is terms else None


def _selection_bias(value: ir.Value | None) -> tuple[ir.Value | None, str | None]:
    """Return what a bias was added to for the choice alone, and the bias."""
    node = producer(past_casts(value), "Add")
    if node is None:
        return value, None
    first, second = node.inputs
    if weight_name(first) is not None:
        first, second = second, first
    name = weight_name(second)
    if name is None:
        raise NotExpressibleError("its router chooses by a sum of scores")
    return first, name


def _groups(value: ir.Value | None) -> tuple[ir.Value | None, Groups | None]:
    """Return the scores before those of all but the best groups are masked, and the groups."""
    node = producer(past_casts(value), "Where")
    if node is None:
        return value, None
    mask, first, second = node.inputs
    inverted = producer(mask, "Not")
    kept, masked, scores = (
        (inverted.inputs[0], first, second) if inverted is not None else (mask, second, first)
    )
    spread = past(kept, "Cast", "Reshape", "Expand", "Unsqueeze", "Identity")
    chosen = producer(spread, "ScatterElements")
    top = None if chosen is None else _chosen(chosen.inputs[1])
    low = scalar(masked)
    if top is None or low is None or low > 0:
        raise NotExpressibleError("its router masks experts in another way than by groups")
    best, grouped = _group_score(top.inputs[0])
    count, keep = sizes(top.inputs[0])[-1], sizes(top.outputs[1])[-1]
    if past_casts(past_reshapes(grouped)) is not past_casts(scores) or not count or not keep:
        raise NotExpressibleError("its router masks groups by other scores than it chooses by")
    return scores, None if keep == count else Groups(count, keep, best)


def _group_score(value: ir.Value | None) -> tuple[int, ir.Value | None]:
    """Return of how many best scores a group's is the sum, and the scores [T, groups, members]."""
    if (node := producer(value, "ReduceMax")) is not None:
        return 1, node.inputs[0]
    node = producer(value, "ReduceSum")
    top = None if node is None else producer(node.inputs[0], "TopK")
    if top is None or not _is_top(top):
        raise NotExpressibleError("its router ranks groups in an unknown way")
    best = sizes(top.outputs[0])[-1]
    if best not in (1, 2):
        raise NotExpressibleError(f"its router ranks groups by their best {best}")
    return best, top.inputs[0]


def _chosen(ids: ir.Value | None) -> ir.Node | None:
    """Return the TopK whose indices `ids` are."""
    node = producer(past(ids, "Cast", "Identity"), "TopK")
    return node if node is not None and _is_top(node) else None


def _is_top(node: ir.Node) -> bool:
    value = node.inputs[0]
    last = len(sizes(value)) - 1
    return bool(integer(node, "largest", 1)) and integer(node, "axis", -1) in (-1, last)
