"""onnxscript's patterns, each tried on nodes of its own operator only."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from onnxscript.rewriter._basics import MatchResult
from onnxscript.rewriter._matcher import SimplePatternMatcher

if TYPE_CHECKING:
    import onnx_ir as ir

_MATCH = SimplePatternMatcher.match


@contextlib.contextmanager
def matching_by_operator() -> Iterator[None]:
    """Let patterns fail at once, inside the block, on nodes of other operators than theirs.

    They fail in any case. But onnxscript prepares for each pattern and node, and for a pattern with
    two ends (two slices) it counts all nodes of the graph: that took a time that grows with the
    square of the number of layers, 7.9 s of a chain of 3500 nodes.
    """
    SimplePatternMatcher.match = _match  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        SimplePatternMatcher.match = _MATCH  # type: ignore[method-assign]


@functools.wraps(_MATCH)
def _match(
    matcher: SimplePatternMatcher, model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any
) -> MatchResult:
    # Matching begins at the first end. Without an operator a pattern takes any.
    wanted = matcher.pattern.output_nodes[0].op_identifier()
    if wanted is not None and wanted[:2] != (node.domain, node.op_type):
        failed: MatchResult = MatchResult().fail("Another operator.")
        return failed
    found: MatchResult = _MATCH(matcher, model, graph, node, **options)
    return found
