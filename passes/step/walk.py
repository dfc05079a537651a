"""Walk a graph once, in order, and write down what it does to the rows of one decode step.

With one token per sequence every value is a row of numbers per sequence, whatever its shape:
reshapes, and transposes of heads and sequence, change nothing. What can't be said is `Lost`, with
the reason, and so is all that is made of it; that matters only if the logits are.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from alloc_moe.passes.attention.right_padded import last_positions
from alloc_moe.passes.base import DOMAIN, MICROSOFT, ROUTED_EXPERTS
from alloc_moe.passes.experts.lower import Allocation
from alloc_moe.passes.step.matching import NotExpressibleError
from alloc_moe.passes.step.operators import attention, elementwise, experts, products
from alloc_moe.passes.step.state import Lost, Results, Visit, Walk

_ALIASES = (
    *("Reshape", "Unsqueeze", "Squeeze", "Identity", "Cast", "Flatten"),
    last_positions.name,  # which of one token is that one
)


def walk_graph(model: ir.Model, allocation: Allocation) -> Walk:
    """Return what a graph does to rows.

    Args:
        model: Its RoutedExperts nodes are not lowered yet, its weights are final.
        allocation: What is kept of their candidates.
    """
    walk = Walk(allocation)
    for node in model.graph:
        if _concerns(walk, node):
            _visit(walk, node)
    return walk


def _concerns(walk: Walk, node: ir.Node) -> bool:
    """Whether a node computes with rows, or makes them."""
    embeds = products.is_embedding(node)
    return embeds or any(walk.known(value) is not None for value in node.inputs)


def _visit(walk: Walk, node: ir.Node) -> None:
    known = node.domain in ("", "ai.onnx", MICROSOFT, DOMAIN)
    visit = _VISITS.get(node.op_type, _unknown) if known else _unknown
    try:
        walk.learn(visit(walk, node))
    except NotExpressibleError as error:
        walk.learn({output: Lost(str(error)) for output in node.outputs})


def _unknown(walk: Walk, node: ir.Node) -> Results:
    """Pass on why what the node computes with is lost, else say that the node is no known one."""
    given = [walk.known(value) for value in node.inputs]
    lost = next((value.reason for value in given if isinstance(value, Lost)), None)
    raise NotExpressibleError(lost or f"it computes {node.op_type}")


_VISITS: Mapping[str, Visit] = {
    **dict.fromkeys(_ALIASES, elementwise.alias),
    "Transpose": elementwise.transpose,
    **dict.fromkeys(products.EMBEDDINGS, products.embed),
    "Split": elementwise.split,
    "Slice": elementwise.slice,
    "Where": elementwise.where,
    "Add": elementwise.add,
    "Sigmoid": elementwise.sigmoid,
    **dict.fromkeys(("QuickGelu", "Swish"), elementwise.silu),
    "Mul": elementwise.mul,
    **dict.fromkeys(("RMSNormalization", "SimplifiedLayerNormalization"), elementwise.norm),
    "SkipSimplifiedLayerNormalization": elementwise.skip_norm,
    **dict.fromkeys(products.PRODUCTS, products.visit),
    "GroupQueryAttention": attention.visit,
    ROUTED_EXPERTS: experts.visit,
}
