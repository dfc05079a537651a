"""Model -> onnx_ir.Model with RoutedExperts nodes and lazy weights.

The only file that touches transformers' experimental exporter and private parts of torch.onnx.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from onnxscript.optimizer import FOLDED_FROM_KEY, optimize_ir
from onnxscript.rewriter import onnx_fusions, rewrite
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.exporters import exporter_dynamo, exporter_onnx
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
from transformers.exporters.utils import decompose_for_generation

from alloc_moe.compiler.export import experts_op, state_ops
from alloc_moe.compiler.export.latent import plain_latent_attention
from alloc_moe.compiler.export.matching import matching_by_operator
from alloc_moe.compiler.export.sinks import sinks_as_columns
from alloc_moe.compiler.export.states import fixed_states, states_as_operators
from alloc_moe.compiler.model.quiet import quiet
from alloc_moe.compiler.model.skeleton import build_skeleton, experts_function
from alloc_moe.passes.base import lazy_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alloc_moe.compiler.model.checkpoint import Checkpoint

ReadWeight = Callable[[str, torch.dtype], torch.Tensor]
"""``read(name, dtype)`` gives a weight as a new tensor of that type."""

# 23 keeps Attention, RMSNormalization and RotaryEmbedding whole; in 24 the exporter loses the last
# two.
OPSET = 23

# Vectors up to this many elements are read at once, so that the optimizer sees their values. A
# matrix is never folded: the passes transpose and quantise it lazily.
_SMALL = 1 << 13

_DTYPES = {
    "float32": (torch.float32, ir.DataType.FLOAT),
    "float16": (torch.float16, ir.DataType.FLOAT16),
    "bfloat16": (torch.bfloat16, ir.DataType.BFLOAT16),
}


def export_graph(
    checkpoint: Checkpoint, *, dtype: str = "float32", read: ReadWeight | None = None
) -> ir.Model:
    """Capture the model once, for any budget.

    Args:
        checkpoint: Its weights are read one by one when the graph is saved. MoE layer i becomes the
            RoutedExperts node with attribute ``layer`` = i.
        dtype: float32, float16 or bfloat16: the type of weights, activations and cache.
        read: What reads a weight, by name and type; the checkpoint's reader by default.

    Returns:
        A graph for prefill, continuation and decode with the key/value cache going in and out, left
        padding and an empty cache included. Names and dimensions are the exporter's.
    """
    torch_dtype, ir_dtype = _DTYPES[dtype]
    with quiet():
        model = build_skeleton(
            checkpoint.config, torch_dtype, trust_remote_code=checkpoint.trust_remote_code
        )
        graph = _capture(model, [layer.experts_name for layer in checkpoint.layers])
        _bind_weights(
            graph, checkpoint.reader, read or checkpoint.reader.read, torch_dtype, ir_dtype
        )
        _optimize(graph)
    return graph


def _capture(model: PreTrainedModel, experts_names: list[str]) -> ir.Model:
    operator = experts_op.register()
    forward = experts_op.experts_forward(model, experts_names)
    table = {operator: experts_op.onnx_translation, **state_ops.register()}
    with (
        experts_function(model, experts_op.IMPLEMENTATION, forward),
        sinks_as_columns(model),
        plain_latent_attention(model),
        states_as_operators(model),
    ):
        component, inputs = sample_inputs(model)
        with mock.patch.dict(exporter_onnx._ONNX_TRANSLATION_TABLE, table):
            exported = OnnxExporter().export(
                component,
                inputs,
                # Weights are zeros here: nothing may be folded before the real ones are bound.
                config=OnnxConfig(
                    dynamic=True,
                    dynamic_shapes=_dynamic_shapes(inputs),
                    opset_version=OPSET,
                    optimize=False,
                ),
            )
    program: ir.Model = exported.program
    return program


def sample_inputs(model: PreTrainedModel) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return what a decode step of several tokens is called with.

    The prompt is left-padded: without padding the mask would not be an input.
    """
    mask = torch.ones((2, 5), dtype=torch.int64)
    mask[0, 0] = 0
    prompt = {
        "input_ids": torch.ones((2, 5), dtype=torch.int64),
        "attention_mask": mask,
        "past_key_values": whole_cache(model),
    }
    settings = model.generation_config
    settings.do_sample, settings.num_beams = False, 1
    settings.eos_token_id, settings.pad_token_id = None, 0
    component, inputs = decompose_for_generation(model, prompt, multi_token_decode=True)["decode"]
    inputs.pop("cache_position", None)
    return component, inputs


def whole_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache that keeps all tokens in layers that attend to the last ones only.

    Their masks hide the others. So all layers keep the same columns from call to call.
    """
    cache = DynamicCache(config=model.config)
    windowed = DynamicSlidingWindowLayer  # no subclass of it: those have states besides
    cache.layers = [DynamicLayer() if type(la) is windowed else la for la in cache.layers]
    return cache


def _dynamic_shapes(inputs: dict[str, Any]) -> Any:
    """Return which dimensions vary.

    Of a cache only batch and past: with every axis declared dynamic, export takes minutes.
    """
    cache = inputs["past_key_values"]
    past, states = cache.get_seq_length(), {id(state) for state in fixed_states(cache)}

    def varying(tensor: torch.Tensor) -> dict[int, Any]:
        lengths: Container[int] = (past,) if tensor.is_floating_point() else range(1, 1 << 30)
        if id(tensor) in states:
            lengths = ()
        axes = [0, *(axis for axis in range(1, tensor.ndim) if tensor.shape[axis] in lengths)]
        return dict.fromkeys(axes, torch.export.Dim.AUTO)

    leaves = {name: value for name, value in inputs.items() if not isinstance(value, bool)}
    with mock.patch.object(exporter_dynamo, "_auto_dynamic_shape", varying):
        return exporter_dynamo.get_auto_dynamic_shapes(leaves)


def _bind_weights(
    graph: ir.Model,
    names: Container[object],
    read_weight: ReadWeight,
    torch_dtype: torch.dtype,
    ir_dtype: ir.DataType,
) -> None:
    for name, value in graph.graph.initializers.items():
        zeros = value.const_value
        if name not in names or zeros is None:
            continue
        shape, dtype = zeros.shape.numpy(), zeros.dtype
        # A float32 parameter inside a float16 model (a router's bias) stays float32.
        target = torch_dtype if dtype == ir_dtype else torch.float32
        read = functools.partial(read_numpy, read_weight, name, target)
        if len(shape) < 2 and np.prod(shape) <= _SMALL:
            value.const_value = ir.Tensor(read(), dtype=dtype, name=name)
        else:
            value.const_value = lazy_tensor(read, shape, dtype, name)


def read_numpy(read_weight: ReadWeight, name: str, dtype: torch.dtype) -> np.ndarray:
    """Return a weight as an array of `dtype`, bfloat16 being ``ml_dtypes``'."""
    tensor = read_weight(name, dtype)
    if dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _optimize(graph: ir.Model) -> None:
    def should_fold(node: ir.Node) -> bool | None:
        # Folding would read a lazy weight and keep the copy; our own pass transposes lazily.
        return False if any(_is_lazy(value) for value in node.inputs) else None

    common.RemoveUnusedNodesPass()(graph)
    with matching_by_operator():
        optimize_ir(graph, should_fold=should_fold)
        rewrite(graph)
        onnx_fusions.fuse(graph)
    # Each fused RotaryEmbedding comes with a cosine and a sine of its own.
    common.CommonSubexpressionEliminationPass()(graph)
    common.RemoveUnusedNodesPass()(graph)
    for value in graph.graph.initializers.values():
        value.metadata_props.pop(FOLDED_FROM_KEY, None)
    common.ClearMetadataAndDocStringPass()(graph)


def _is_lazy(value: ir.Value | None) -> bool:
    return value is not None and isinstance(value.const_value, ir.LazyTensor)
