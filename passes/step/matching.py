"""Small questions about nodes and values that the step program's modules share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from alloc_moe.passes.step.parts import Format

_RESHAPING = {"Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten"}


class NotExpressibleError(Exception):
    """Something that a step program has no words for; the message says what."""


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that makes `value` if its operator is one of `op_types`."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in op_types else None


def argument(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input, None if it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def past(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """Return what `value` is made of by nodes of `op_types` alone, through first inputs."""
    while (node := producer(value, *op_types)) is not None:
        value = node.inputs[0]
    return value


def past_reshapes(value: ir.Value | None) -> ir.Value | None:
    """Return what `value` holds the numbers of."""
    return past(value, *_RESHAPING)


def past_casts(value: ir.Value | None) -> ir.Value | None:
    """Return what `value` is a conversion of."""
    return past(value, "Cast", "Identity")


def scalar(value: ir.Value | None) -> float | None:
    """Return the number that a constant of one element holds."""
    numbers = constant(value, most=1)
    return None if numbers is None else float(numbers.reshape(-1)[0])


def constant(value: ir.Value | None, *, most: int = 64) -> np.ndarray | None:
    """Return a constant of up to `most` elements; larger ones are not read."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor.numpy() if tensor is not None and 0 < tensor.size <= most else None


def integer(node: ir.Node, name: str, default: int) -> int:
    """Return an attribute."""
    return node.attributes[name].as_int() if name in node.attributes else default


def real(node: ir.Node, name: str, default: float) -> float:
    """Return an attribute."""
    return float(node.attributes[name].as_float()) if name in node.attributes else default


def sizes(value: ir.Value | None) -> Sequence[int | None]:
    """Return the dimensions of a value, None where they aren't fixed, none if unknown."""
    if value is None or value.shape is None:
        return ()
    return [dim if isinstance(dim, int) else None for dim in value.shape]


def weight_name(value: ir.Value | None) -> str | None:
    """Return the name of the initializer that `value` is, through conversions."""
    source = past_casts(value)
    if source is None or not source.is_initializer() or source.const_value is None:
        return None
    return source.name


def matrix(node: ir.Node) -> tuple[str, int, int] | None:
    """Return (name, N, K) of the weight [N, K] that a product multiplies its first input by."""
    given, transposed = argument(node, 1), _is_transposed(node)
    if node.op_type == "MatMul" and (transpose := producer(given, "Transpose")) is not None:
        given, transposed = transpose.inputs[0], True
    name, shape = weight_name(given), sizes(past_casts(given))
    if name is None or len(shape) != 2 or not transposed or not _is_plain(node):
        return None
    rows, columns = shape
    return None if rows is None or columns is None else (name, rows, columns)


def block_format(node: ir.Node, scales: int, zero_points: int, *more: int) -> Format:
    """Return how a node's weight is quantised, of which it has no inputs `more`.

    Args:
        node: MatMulNBits or GatherBlockQuantized.
        scales: The index of that input.
        zero_points: The index of that one.
        more: Those of inputs that a program has no words for.
    """
    given = [argument(node, index) for index in (scales, zero_points)]
    names = [None if value is None else weight_name(value) for value in given]
    lost = any(value is not None and not name for value, name in zip(given, names, strict=True))
    if names[0] is None or lost or any(argument(node, index) is not None for index in more):
        raise NotExpressibleError(f"{node.name or node.op_type} is quantised in another way")
    bits, block = integer(node, "bits", 4), integer(node, "block_size", 0)
    check_block(bits, block)
    return Format(bits, block, names[0], names[1])


def check_block(bits: int, block: int) -> None:
    """Raise NotExpressibleError for blocks that 16 bytes of values go beyond."""
    if block % (128 // bits):
        raise NotExpressibleError(f"{bits}-bit weights have a scale for each {block}")


def _is_transposed(node: ir.Node) -> bool:
    return bool(integer(node, "transB", 0))


def _is_plain(node: ir.Node) -> bool:
    ones = all(real(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
    names = ("transA", "transBatchA", "transBatchB")
    return ones and not any(integer(node, name, 0) for name in names)
