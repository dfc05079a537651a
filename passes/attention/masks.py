"""What an attention mask hides besides padding, as the exporter writes it."""

from __future__ import annotations

import onnx_ir as ir

_COMPARISONS = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}


def window_of(mask: ir.Value | None) -> int | None:
    """Return how many tokens a mask lets each token see, itself included; 0 if all before it.

    Such a mask comes of the attention mask and of comparisons of columns with positions: one of
    them hides later tokens, in a window a second one those at a distance.

    Returns:
        None if the mask hides anything else.
    """
    if mask is None:
        return None
    found: dict[str, ir.Node] = {}
    seen: set[ir.Node] = set()
    todo = [mask]
    while todo:
        node = todo.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type in _COMPARISONS:
            if node.op_type in found:
                return None
            found[node.op_type] = node
        todo += [value for value in node.inputs if value is not None]
    if found.keys() == {"LessOrEqual"}:
        return 0
    if found.keys() == {"LessOrEqual", "Greater"}:
        return _distance(found["Greater"], found["LessOrEqual"])
    return None


def _distance(farther: ir.Node, later: ir.Node) -> int | None:
    """Return the window of ``column > position - window`` and ``column <= position``."""
    start = farther.inputs[1]
    before = None if start is None else start.producer()
    if before is None or before.op_type != "Sub":
        return None
    if farther.inputs[0] is not later.inputs[0] or before.inputs[0] is not later.inputs[1]:
        return None
    window = ir.convenience.get_const_tensor(before.inputs[1]) if before.inputs[1] else None
    return int(window.numpy().item()) if window is not None and window.size == 1 else None


def split_sinks(
    mask: ir.Value | None, heads: int
) -> tuple[ir.Value | None, ir.TensorProtocol | None]:
    """Split a mask whose last column holds the sinks, one score per head, into mask and sinks."""
    node = None if mask is None else mask.producer()
    if node is None or node.op_type != "Concat" or node.attributes["axis"].as_int() not in (-1, 3):
        return mask, None
    rest, column = node.inputs
    while column is not None:
        tensor = ir.convenience.get_const_tensor(column)
        if tensor is not None:
            return (rest, tensor) if tensor.size == heads else (mask, None)
        made = column.producer()
        if made is None or made.op_type not in ("Expand", "Reshape", "Unsqueeze", "Cast"):
            break
        column = made.inputs[0]
    return mask, None
