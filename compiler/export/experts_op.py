"""alloc_moe::RoutedExperts, the one abstract operator that every MoE layer is exported as.

    RoutedExperts(hidden [T, H], expert_ids [T, K], expert_weights [T, K],
                  gate_up, gate_up_bias?, down, down_bias?) -> [T, H]

Its attributes alpha, beta and limit are those of the experts' gate (`Gate` in
`compiler/model/architectures.py`). Where ``gated`` is 0, gate_up has the rows of up only, which are
those of the gate as well.
The router stays as it is, at its trained K; the passes lower the operator to what a plan asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx
import torch
from onnxscript.values import Opset

from alloc_moe.compiler.model.architectures import find_gate, first_projection
from alloc_moe.passes.base import DOMAIN, ROUTED_EXPERTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "alloc_moe_export"


@functools.cache
def register() -> Callable[..., torch.Tensor]:
    """Register operator and ONNX schema, once per process; return the torch operator."""
    _register_schema()

    @torch.library.custom_op("alloc_moe::routed_experts", mutates_args=())
    def routed_experts(
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        gate_up: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down: torch.Tensor,
        down_bias: torch.Tensor | None,
        layer: int,
        transposed: bool,
        interleaved: bool,
        gated: bool,
        alpha: float,
        beta: float,
        limit: float,
    ) -> torch.Tensor:
        # Only shapes matter: it is traced, and run once on zero weights to find the inputs.
        return torch.zeros_like(hidden)

    routed_experts.register_fake(lambda hidden, *_: torch.empty_like(hidden))
    overload: Callable[..., torch.Tensor] = torch.ops.alloc_moe.routed_experts.default
    return overload


def _register_schema() -> None:
    parameter = onnx.defs.OpSchema.FormalParameter
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            ROUTED_EXPERTS,
            DOMAIN,
            1,
            inputs=[
                parameter("hidden", "T"),
                parameter("expert_ids", "tensor(int64)"),
                parameter("expert_weights", "T"),
                parameter("gate_up", "T"),
                parameter("gate_up_bias", "T", param_option=optional),
                parameter("down", "T"),
                parameter("down_bias", "T", param_option=optional),
            ],
            outputs=[parameter("output", "T")],
            type_constraints=[
                ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Activations")
            ],
            attributes=[
                *(
                    onnx.defs.OpSchema.Attribute(name, onnx.defs.OpSchema.AttrType.INT, "")
                    for name in ("layer", "transposed", "interleaved", "gated")
                ),
                *(
                    onnx.defs.OpSchema.Attribute(name, onnx.defs.OpSchema.AttrType.FLOAT, "")
                    for name in ("alpha", "beta", "limit")
                ),
            ],
        )
    )


def onnx_translation(
    hidden: Any,
    expert_ids: Any,
    expert_weights: Any,
    gate_up: Any,
    gate_up_bias: Any,
    down: Any,
    down_bias: Any,
    layer: int,
    transposed: bool,
    interleaved: bool,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float,
) -> Any:
    """Translate the torch operator while torch.onnx records."""
    return Opset(DOMAIN, 1).RoutedExperts(
        hidden,
        expert_ids,
        expert_weights,
        gate_up,
        gate_up_bias,
        down,
        down_bias,
        layer=layer,
        transposed=int(transposed),
        interleaved=int(interleaved),
        gated=int(gated),
        alpha=alpha,
        beta=beta,
        limit=limit,
    )


def experts_forward(model: PreTrainedModel, names: list[str]) -> Callable[..., torch.Tensor]:
    """Return the experts function that records the operator for `names`, `model`'s experts."""
    operator = register()
    modules = [model.get_submodule(name) for name in names]
    index = {id(module): layer for layer, module in enumerate(modules)}
    gates = [find_gate(module) for module in modules]

    def forward(
        self: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        layer = index[id(self)]
        gate, first = gates[layer], first_projection(self)
        assert gate is not None  # else the model was refused
        return operator(
            hidden,
            ids,
            weights.to(hidden.dtype),
            getattr(self, first),
            getattr(self, f"{first}_bias") if self.has_bias else None,
            self.down_proj,
            self.down_proj_bias if self.has_bias else None,
            layer,
            self.is_transposed,
            not self.is_concatenated,
            self.has_gate,
            gate.alpha,
            gate.beta,
            gate.limit,
        )

    return forward
