"""Operators whose state goes from call to call beside keys and values, as they are exported.

    CausalConvWithState(x [B, C, T], weight [C, 1, k], bias [C]?, past [B, C, k - 1])
        -> [B, C, T], present
    LinearAttention(query [B, T, H K], key [B, T, H K], value [B, T, H V], past [B, H, K, V],
                    decay [B, T, H] or [B, T, H K], beta [B, T, H]?) -> [B, T, H V], present

Both are onnxruntime's own. They compute prompts, their continuation and single tokens alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript.values import Opset

from alloc_moe.passes.base import MICROSOFT

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


@functools.cache
def register() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Register operators and ONNX schemas, once per process; return how each is translated."""
    _register_schemas()

    # Only shapes matter: they are traced, and run on zero weights to find the inputs.
    @torch.library.custom_op("alloc_moe::causal_conv", mutates_args=())
    def causal_conv(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        past: torch.Tensor,
        activation: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(x), torch.zeros_like(past)

    @torch.library.custom_op("alloc_moe::linear_attention", mutates_args=())
    def linear_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor | None,
        rule: str,
        heads: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(value), torch.zeros_like(past)

    causal_conv.register_fake(
        lambda x, weight, bias, past, activation: (torch.empty_like(x), torch.empty_like(past))
    )
    linear_attention.register_fake(
        lambda query, key, value, past, *_: (torch.empty_like(value), torch.empty_like(past))
    )
    return {
        torch.ops.alloc_moe.causal_conv.default: _translate_causal_conv,
        torch.ops.alloc_moe.linear_attention.default: _translate_linear_attention,
    }


def _register_schemas() -> None:
    attribute, kinds = onnx.defs.OpSchema.Attribute, onnx.defs.OpSchema.AttrType
    _register_schema(
        "CausalConvWithState",
        ("input", "weight", "bias?", "past_state"),
        [attribute("activation", kinds.STRING, "")],
    )
    _register_schema(
        "LinearAttention",
        ("query", "key", "value", "past_state", "decay", "beta?"),
        [
            attribute("update_rule", kinds.STRING, ""),
            attribute("q_num_heads", kinds.INT, ""),
            attribute("kv_num_heads", kinds.INT, ""),
            attribute("scale", kinds.FLOAT, ""),
        ],
    )


def _register_schema(
    name: str, inputs: tuple[str, ...], attributes: list[onnx.defs.OpSchema.Attribute]
) -> None:
    parameter, options = (
        onnx.defs.OpSchema.FormalParameter,
        onnx.defs.OpSchema.FormalParameterOption,
    )
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            name,
            MICROSOFT,
            1,
            inputs=[
                parameter(
                    given.rstrip("?"),
                    "T",
                    param_option=options.Optional if given.endswith("?") else options.Single,
                )
                for given in inputs
            ],
            outputs=[parameter("output", "T"), parameter("present_state", "T")],
            type_constraints=[("T", _FLOATS, "Activations and states")],
            attributes=attributes,
        )
    )


def _translate_causal_conv(x: Any, weight: Any, bias: Any, past: Any, activation: str) -> Any:
    return Opset(MICROSOFT, 1).CausalConvWithState(x, weight, bias, past, activation=activation)


def _translate_linear_attention(
    query: Any,
    key: Any,
    value: Any,
    past: Any,
    decay: Any,
    beta: Any,
    rule: str,
    heads: int,
    scale: float,
) -> Any:
    return Opset(MICROSOFT, 1).LinearAttention(
        query,
        key,
        value,
        past,
        decay,
        beta,
        update_rule=rule,
        q_num_heads=heads,
        kv_num_heads=heads,
        scale=scale,
    )
