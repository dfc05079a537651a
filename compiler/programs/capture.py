"""Checkpoint and plan -> torch.export.ExportedProgram, with weights that take no memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental import _config as shape_settings
from transformers.exporters.utils import apply_patches

from alloc_moe.compiler.correction.folding import ADDED_BIAS
from alloc_moe.compiler.export.graph import sample_inputs, whole_cache
from alloc_moe.compiler.export.sinks import sinks_as_columns
from alloc_moe.compiler.model.architectures import Gate, find_gate
from alloc_moe.compiler.model.quiet import quiet
from alloc_moe.compiler.model.skeleton import build_skeleton, experts_function
from alloc_moe.compiler.programs.experts import (
    TracedCall,
    grouped_product,
    run_planned,
)
from alloc_moe.compiler.reference.experts import replaced_experts
from alloc_moe.compiler.reference.policies import layer_parameters
from alloc_moe.runtime.execution.torch_programs.loading import CacheTensor

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from transformers import PreTrainedModel

    from alloc_moe.compiler.model.checkpoint import Checkpoint
    from alloc_moe.compiler.records import Correction
    from alloc_moe.runtime.artifact.plan import AllocationPlan

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PROBE = "alloc_moe_probe_inputs"
_MODEL = "model."
_KEPT_META = ("val", "nn_module_stack")
_ASSERTIONS = (
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
)


@dataclass(frozen=True)
class Captured:
    """A model under a plan.

    ``program`` takes input_ids [B, S], attention_mask [B, past + S], position_ids [B, S], the
    cache's tensors, the price of an activation if there is a dial (negative: the plan's), and the
    columns [n] whose logits are wanted. It gives logits [B, n, vocabulary], the grown cache, and
    how many experts ran [layers, B * S].

    ``parameters`` are the names, in the model, of each entry of the program's state, and ``owners``
    the first entry that shares its memory; ``dtype`` is that of weights and cache.
    """

    program: ExportedProgram
    cache: tuple[CacheTensor, ...]
    parameters: dict[str, str]
    owners: dict[str, str]
    vocabulary: int
    dtype: str
    has_dial: bool


def capture(
    checkpoint: Checkpoint,
    plan: AllocationPlan,
    *,
    dtype: str,
    corrections: Sequence[Correction | None] = (),
) -> Captured:
    """Trace the model under a plan.

    Args:
        checkpoint: None of its weights is read.
        plan: What is compiled in.
        dtype: float32 or bfloat16: the type of weights, activations and cache.
        corrections: What experts are changed by; here only whether they get a bias matters.
    """
    with quiet():
        model = build_skeleton(
            checkpoint.config, _DTYPES[dtype], trust_remote_code=checkpoint.trust_remote_code
        )
        names = [layer.experts_name for layer in checkpoint.layers]
        for name, correction in zip(names, corrections, strict=False):
            _add_bias(model.get_submodule(name), correction)
        with experts_function(model, _PROBE, lambda _, hidden, *__: torch.zeros_like(hidden)):
            _, inputs = sample_inputs(model)
        with sinks_as_columns(model):
            return _trace(model, names, plan, inputs, dtype)


def _add_bias(experts: Any, correction: Correction | None) -> None:
    if correction is None or correction.bias is None or experts.has_bias:
        return
    shape = correction.bias.shape
    zero = torch.zeros((), dtype=experts.down_proj.dtype).expand(shape)
    experts.register_parameter(ADDED_BIAS, torch.nn.Parameter(zero, requires_grad=False))


class _Planned(torch.nn.Module):
    """The model as a function of plain tensors."""

    def __init__(self, model: PreTrainedModel, names: list[str], plan: AllocationPlan) -> None:
        super().__init__()
        self.model = model
        gates = [find_gate(model.get_submodule(name)) or Gate() for name in names]
        self._plan = plan
        self._layers = list(zip(names, layer_parameters(plan), gates, strict=True))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache: list[torch.Tensor],
        columns: torch.Tensor,
        price: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        call = TracedCall(attention_mask[:, -input_ids.shape[1] :] != 0, price)
        calls = {
            name: functools.partial(run_planned, call, self._plan, given, gate)
            for name, given, gate in self._layers
        }
        past = whole_cache(self.model)
        for index, layer in enumerate(past.layers):
            keys, values = cache[2 * index : 2 * index + 2]
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        with replaced_experts(self.model, calls):
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past,
                use_cache=True,
                logits_to_keep=columns,
                return_dict=True,
            )
        grown = [t for la in output.past_key_values.layers for t in (la.keys, la.values)]
        return output.logits, grown, torch.stack(call.kept)


def _trace(
    model: PreTrainedModel,
    names: list[str],
    plan: AllocationPlan,
    inputs: dict[str, Any],
    dtype: str,
) -> Captured:
    past = inputs["past_key_values"]
    cache = [tensor for layer in past.layers for tensor in (layer.keys, layer.values)]
    shapes = tuple(_cache_shape(tensor, past.get_seq_length()) for tensor in cache)
    ids = inputs["input_ids"]
    arguments = {
        "input_ids": ids,
        "attention_mask": inputs["attention_mask"],
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids).contiguous(),
        "cache": cache,
        "columns": torch.arange(ids.shape[1]),
        **({"price": torch.tensor(-1.0)} if plan.takes_price else {}),
    }
    # Sizes of 0 and 1 are sizes as any other: an empty cache, a batch of one, a single token.
    oblivious = shape_settings.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    planned = _Planned(model, names, plan)
    with torch.no_grad(), apply_patches("dynamo"), oblivious:
        program = torch.export.export(
            planned,
            (),
            arguments,
            dynamic_shapes=_varying(arguments, shapes),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    _simplify(program)
    parameters = {name: name.removeprefix(_MODEL) for name in program.state_dict}
    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(t), name) for name, t in program.state_dict.items()}
    vocabulary = model.config.get_text_config().vocab_size
    return Captured(program, shapes, parameters, owners, vocabulary, dtype, plan.takes_price)


def _cache_shape(tensor: torch.Tensor, past: int) -> CacheTensor:
    axes = [axis for axis in range(1, tensor.ndim) if tensor.shape[axis] == past]
    axis = 2 if 2 in axes else axes[0]
    sizes = [None if index in (0, axis) else size for index, size in enumerate(tensor.shape)]
    return CacheTensor(tuple(sizes), axis)


def _varying(arguments: dict[str, Any], cache: Sequence[CacheTensor]) -> dict[str, Any]:
    """Return which sizes differ from call to call."""
    auto = torch.export.Dim.AUTO
    tokens = {name: {0: auto, 1: auto} for name in ("input_ids", "attention_mask", "position_ids")}
    slots = [{0: auto, shape.past_axis: auto} for shape in cache]
    varying: dict[str, Any] = {**tokens, "cache": slots, "columns": {0: auto}, "price": {}}
    return {name: varying[name] for name in arguments}


def _simplify(program: ExportedProgram) -> None:
    """Let the product be torch's own, and leave out what only checks what the runtime checked."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is grouped_product():
            node.target = torch.ops.aten._grouped_mm.default
        elif node.target in _ASSERTIONS:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in graph.nodes:  # not the lines of source it came from, with paths of this machine
        node.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
    program.graph_module.recompile()
