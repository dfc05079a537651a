"""What stands for transformers' convolutions and recurrences, as onnxruntime computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig
from transformers.cache_utils import LinearAttentionLayer
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.jamba import modeling_jamba as jamba
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.export import states
from alloc_moe.compiler.model.skeleton import build_skeleton

BATCH, LENGTH, HEADS = 2, 70, 4
TOLERANCE = 2e-5  # of sums over more tokens than a chunk of transformers has


def run_operator(
    name: str, inputs: Sequence[torch.Tensor | None], attributes: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what onnxruntime's operator makes of float32 tensors."""
    values = [
        None if given is None else ir.val(f"x{index}", ir.DataType.FLOAT, given.shape)
        for index, given in enumerate(inputs)
    ]
    node = ir.node(name, values, attributes, domain="com.microsoft", num_outputs=2)
    for output, called in zip(node.outputs, ("made", "present"), strict=True):
        output.name, output.type = called, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [value for value in values if value is not None],
        node.outputs,
        nodes=[node],
        opset_imports={"": 23, "com.microsoft": 1},
        name="operator",
    )
    content = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    fed = {f"x{i}": given.numpy() for i, given in enumerate(inputs) if given is not None}
    made, present = session.run(None, fed)
    return torch.from_numpy(made), torch.from_numpy(present)


@pytest.fixture(autouse=True)
def operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have operators that compute in place of those that are only traced."""

    def causal_conv(x: Any, weight: Any, bias: Any, past: Any, activation: str) -> Any:
        inputs = [x, weight, bias, past]
        return run_operator("CausalConvWithState", inputs, {"activation": activation})

    def linear_attention(*given: Any) -> Any:
        *inputs, rule, heads, scale = given
        sizes = {"q_num_heads": heads, "kv_num_heads": heads}
        return run_operator(
            "LinearAttention", inputs, {"update_rule": rule, "scale": scale, **sizes}
        )

    namespace = torch.ops.alloc_moe
    monkeypatch.setattr(namespace, "causal_conv", causal_conv, raising=False)
    monkeypatch.setattr(namespace, "linear_attention", linear_attention, raising=False)


@pytest.fixture
def normal() -> Callable[..., torch.Tensor]:
    """Return a function from sizes to random numbers."""
    random = torch.Generator().manual_seed(0)
    return lambda *sizes: torch.randn(*sizes, generator=random)


def assert_close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_the_gated_delta_rule(normal: Callable[..., torch.Tensor], key_heads: int) -> None:
    query, key = (normal(BATCH, LENGTH, key_heads, 16) for _ in range(2))
    value, decay = normal(BATCH, LENGTH, HEADS, 8), -normal(BATCH, LENGTH, HEADS).abs() / 4
    beta, state = normal(BATCH, LENGTH, HEADS).sigmoid(), normal(BATCH, HEADS, 16, 8)
    given = (query, key, value, decay, beta)
    options: dict[str, Any] = {"initial_state": state, "use_qk_l2norm_in_kernel": True}
    expected = qwen.torch_chunk_gated_delta_rule(*given, **options, output_final_state=True)
    found = states.gated_delta_rule(*given, initial_state=state)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs)


def test_the_delta_rule_with_a_decay_of_each_channel(normal: Callable[..., torch.Tensor]) -> None:
    query, key = (normal(BATCH, LENGTH, HEADS, 16) for _ in range(2))
    value, decay = normal(BATCH, LENGTH, HEADS, 8), -normal(BATCH, LENGTH, HEADS, 16).abs() / 4
    beta, state = normal(BATCH, LENGTH, HEADS).sigmoid(), normal(BATCH, HEADS, 16, 8)
    given = (query, key, value, decay, beta)
    expected = kimi.recurrent_kimi_delta_attention(*given, state, True, True)
    found = states.gated_delta_rule(*given, initial_state=state)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.3, 0.9)], ids=str)
def test_the_scan_of_heads(normal: Callable[..., torch.Tensor], limit: tuple[float, float]) -> None:
    x, dt = normal(BATCH, LENGTH, HEADS, 16), normal(BATCH, LENGTH, HEADS)
    a, b, c = -normal(HEADS).exp(), normal(BATCH, LENGTH, 2, 8), normal(BATCH, LENGTH, 2, 8)
    options: dict[str, Any] = {"D": normal(HEADS), "dt_bias": normal(HEADS), "dt_limit": limit}
    state = normal(BATCH, HEADS, 16, 8)
    expected, last = granite.mamba2_chunk_scan(
        *(x, dt, a, b, c, 32),
        **options,
        initial_states=state,
        dt_softplus=True,
        return_final_states=True,
    )
    found, present = states.scan_heads(x, dt, a, b, c, **options, initial_states=state.mT)
    assert_close(found, expected)
    assert_close(present.mT, last)


def test_the_scan_of_channels_goes_on_from_its_state(normal: Callable[..., torch.Tensor]) -> None:
    """Transformers' own begins every prompt anew, so it is given all tokens at once."""
    channels, size, first = 6, 8, 30
    x, dt, gate = (normal(BATCH, channels, LENGTH) for _ in range(3))
    a, b, c = (
        -normal(channels, size).exp(),
        normal(BATCH, size, LENGTH),
        normal(BATCH, size, LENGTH),
    )
    skip, bias = normal(channels), normal(channels)
    options = {"D": skip, "delta_bias": bias}
    expected, last = jamba.mamba_selective_scan(
        x, dt, a, b, c, z=gate, delta_softplus=True, return_last_state=True, **options
    )
    layer, convolution = LinearAttentionLayer(), states._Convolution()
    convolution._convolved = layer, 0
    parts = []
    for part in (slice(first), slice(first, LENGTH)):
        whole = (x, dt, b, c, gate)
        now_x, now_dt, now_b, now_c, now_gate = (given[..., part] for given in whole)
        made, state = convolution.scan_channels(
            now_x, now_dt, a, now_b, now_c, z=now_gate, **options
        )
        parts.append(made)
        layer.recurrent_states[0] = state
    assert_close(torch.cat(parts, -1), expected)
    assert_close(layer.recurrent_states[0][..., 0], last)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("biased", [True, False])
def test_convolutions_go_on_from_their_last_columns(
    normal: Callable[..., torch.Tensor], activation: str | None, biased: bool
) -> None:
    channels, taps = 6, 4
    x, weight = normal(BATCH, channels, LENGTH), normal(channels, taps)
    bias = normal(channels) if biased else None
    expected = functional.conv1d(
        functional.pad(x, (taps - 1, 0)), weight[:, None], bias, groups=channels
    )
    layer, convolution, parts = LinearAttentionLayer(), states._Convolution(), []
    for part in (slice(2), slice(2, 3), slice(3, LENGTH)):
        given = convolution.remember(layer, x[..., part])
        parts.append(convolution.apply(given, weight, bias, activation))
    found = torch.cat(parts, -1)
    assert_close(found, expected if activation is None else functional.silu(expected))
    torch.testing.assert_close(layer.conv_states[0], x[..., 1 - taps :], atol=0, rtol=0)


def test_a_recurrence_that_is_not_known_is_refused() -> None:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 16)
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2)
    config = AutoConfig.for_model("minimax", num_hidden_layers=2, head_dim=8, **sizes, **heads)
    message = "minimax keeps the states of its layers of type linear_attention in a way of its own"
    skeleton = build_skeleton(config, torch.float32)
    with (
        pytest.raises(UnsupportedModelError, match=message),
        states.states_as_operators(skeleton),
    ):
        pass
