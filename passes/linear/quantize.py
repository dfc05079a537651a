"""Store the weights of linear layers and embeddings in 4 or 8 bits, one scale per block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from alloc_moe.passes.base import MICROSOFT, add_initializer, lazy_parts
from alloc_moe.passes.blockwise import BlockFormat, quantize

INT8_ACTIVATIONS = 4
"""The accuracy level at which the CPU kernels round activations to 8 bits, for speed."""


class QuantizeMatMulsPass(ir.passes.InPlacePass):
    """Turn ``MatMul(x, Transpose(weight))`` and its like into MatMulNBits.

    ``Gemm`` with a transposed weight becomes the same, ``Gather(weight, ids)``, an embedding,
    GatherBlockQuantized. Runs before transposes are folded, as they take weights [out, in], as
    checkpoints have them.

    Args:
        formats: By name of the weight; weights not listed stay as they are.
    """

    def __init__(self, formats: Mapping[str, BlockFormat]) -> None:
        super().__init__()
        self._formats = formats

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node, weight in list(_uses(model, self._formats)):
            form = self._formats[weight.name or ""]
            make = _gather if node.op_type == "Gather" else _matmul
            replacement = make(model, node, weight, form)
            replacement.outputs[0].name = node.outputs[0].name
            replacement.outputs[0].shape = node.outputs[0].shape
            replacement.outputs[0].type = node.outputs[0].type
            model.graph.insert_before(node, replacement)
            ir.convenience.replace_all_uses_with(
                node.outputs[0], replacement.outputs[0], replace_graph_outputs=True
            )
            model.graph.remove(node, safe=True)
            for transpose in weight.consumers():
                if not transpose.outputs[0].uses():
                    model.graph.remove(transpose, safe=True)
            modified = True
        if modified:
            model.opset_imports.setdefault(MICROSOFT, 1)
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        found = model.graph.initializers
        left = [name for name in self._formats if name in found and found[name].uses()]
        if left:
            raise ir.passes.PostconditionError(f"The weights {left} are still used as floats.")


def _uses(
    model: ir.Model, formats: Mapping[str, BlockFormat]
) -> Iterator[tuple[ir.Node, ir.Value]]:
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            continue
        weight: ir.Value | None = None
        if node.op_type == "MatMul":
            transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
            if transpose is not None and transpose.op_type == "Transpose":
                weight = transpose.inputs[0]
        elif node.op_type == "Gemm" and _transposed(node):
            weight = node.inputs[1]
        elif node.op_type == "Gather":
            weight = node.inputs[0]
        if weight is not None and weight.is_initializer() and weight.name in formats:
            yield node, weight


def _transposed(gemm: ir.Node) -> bool:
    return "transB" in gemm.attributes and bool(gemm.attributes["transB"].as_int())


def _matmul(model: ir.Model, node: ir.Node, weight: ir.Value, form: BlockFormat) -> ir.Node:
    tensor = weight.const_value
    assert tensor is not None
    rows, columns = tensor.shape.numpy()
    blocks = columns // form.block
    shape = (rows, blocks, form.packed_columns(form.block))
    packed, scales = _parts(model, weight, form, shape, (rows, blocks))
    attributes = {
        "N": rows,
        "K": columns,
        "bits": form.bits,
        "block_size": form.block,
        "accuracy_level": INT8_ACTIVATIONS,
    }
    inputs = [node.inputs[0], packed, scales]
    if len(node.inputs) > 2 and node.inputs[2] is not None:  # of a Gemm
        inputs += [None, None, node.inputs[2]]
    return ir.node("MatMulNBits", inputs, attributes=attributes, domain=MICROSOFT, name=node.name)


def _gather(model: ir.Model, node: ir.Node, weight: ir.Value, form: BlockFormat) -> ir.Node:
    tensor = weight.const_value
    assert tensor is not None
    rows, columns = tensor.shape.numpy()
    packed, scales = _parts(
        model,
        weight,
        form,
        (rows, form.packed_columns(columns)),
        (rows, columns // form.block),
        suffix=".rows",
    )
    attributes = {
        "bits": form.bits,
        "block_size": form.block,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    inputs = [packed, node.inputs[1], scales]
    return ir.node(
        "GatherBlockQuantized", inputs, attributes=attributes, domain=MICROSOFT, name=node.name
    )


def _parts(
    model: ir.Model,
    weight: ir.Value,
    form: BlockFormat,
    shape: tuple[int, ...],
    scales_shape: tuple[int, ...],
    *,
    suffix: str = "",
) -> tuple[ir.Value, ir.Value]:
    """Return packed values and scales of a weight, made once however often it is used."""
    tensor = weight.const_value
    assert tensor is not None
    name = f"{weight.name}.int{form.bits}{suffix}"
    found = model.graph.initializers
    if name in found:
        return found[name], found[f"{name}.scales"]
    dtype = tensor.dtype.numpy()

    def compute() -> tuple[np.ndarray, np.ndarray]:
        packed, scales = quantize(tensor.numpy(), form)
        return packed.reshape(shape), scales.astype(dtype)

    specifications = [
        (name, shape, ir.DataType.UINT8),
        (f"{name}.scales", scales_shape, tensor.dtype),
    ]
    packed, scales = (add_initializer(model, part) for part in lazy_parts(compute, specifications))
    return packed, scales
