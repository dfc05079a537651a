"""Layers with a state of fixed size, exported by one operator for prompts and single tokens.

transformers computes these in one way for a prompt and another for a token, in functions of the
same names in every family that has them. They are replaced while a model is captured.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.nn.functional import silu, softplus
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.model.architectures import kinds_with_states

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_NORM_EPSILON = 1e-6  # of queries and keys, in all families


@contextlib.contextmanager
def states_as_operators(model: PreTrainedModel) -> Iterator[None]:
    """Let the states of a model go through onnxruntime's operators inside the block.

    Raises:
        UnsupportedModelError: It computes them in none of the ways that are known.
    """
    kinds = kinds_with_states(model.config)
    modules = [sys.modules[name] for name in {type(m).__module__ for m in model.modules()}]
    if kinds and not any(hasattr(module, "causal_conv1d_fn") for module in modules):
        raise UnsupportedModelError(
            f"{model.config.model_type} keeps the states of its layers of type "
            f"{' and '.join(kinds)} in a way of its own, which isn't exported."
        )
    convolution = _Convolution()
    replacements: dict[str, Callable[..., Any]] = {
        "causal_conv1d_fn": convolution.apply,
        "torch_chunk_gated_delta_rule": gated_delta_rule,
        "torch_recurrent_gated_delta_rule": gated_delta_rule,
        "chunk_kimi_delta_attention": gated_delta_rule,
        "recurrent_kimi_delta_attention": gated_delta_rule,
        "mamba2_chunk_scan": scan_heads,
        "mamba2_selective_state_update": _only_shaped,
        "mamba_selective_scan": convolution.scan_channels,
        "mamba_selective_state_update": _only_shaped,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(
                LinearAttentionLayer,
                "update_conv_state",
                lambda *given, **options: convolution.remember(*given, **options),
            )
        )
        for module in modules:
            for function, replacement in replacements.items():
                if hasattr(module, function):
                    stack.enter_context(mock.patch.object(module, function, replacement))
        yield


def fixed_states(cache: Cache) -> Iterator[torch.Tensor]:
    """Yield what a cache holds whose size doesn't depend on the number of tokens."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            states = (*layer.conv_states.values(), *layer.recurrent_states.values())
            yield from (state for state in states if state is not None)


class _Convolution:
    """A causal convolution and the last columns of its input, one fewer than it is wide.

    transformers first tells the cache of the input, then convolves what the cache gives back.
    """

    def __init__(self) -> None:
        self._layer: Any = None
        self._convolved: Any = None

    def remember(self, layer: Any, x: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        """Stand for the cache's `update_conv_state`: hand the input [batch, channels, sequence] on.

        What the cache holds then is for `apply` to say.
        """
        self._layer = layer, state_idx
        return x

    def apply(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Return the convolution [batch, channels, sequence] of what was remembered last."""
        (layer, index), self._layer = self._layer, None
        past = layer.conv_states[index]
        if past is None:
            past = x.new_zeros(*x.shape[:2], weight.shape[-1] - 1)
        made, present = torch.ops.alloc_moe.causal_conv(
            x, weight.unsqueeze(1), bias, past, activation or "none"
        )
        layer.conv_states[index] = present
        layer.is_conv_states_initialized[index] = layer.has_previous_state[index] = True
        self._convolved = layer, index
        return made  # type: ignore[no-any-return]

    def scan_channels(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,  # noqa: N803, as transformers calls them
        B: torch.Tensor,  # noqa: N803
        C: torch.Tensor,  # noqa: N803
        D: torch.Tensor,  # noqa: N803
        *,
        z: torch.Tensor,
        delta_bias: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what Mamba's scan over a sequence does, with the state that it goes on from.

        transformers' own begins every prompt anew, so the state is that of the convolution before.

        Args:
            hidden_states: [batch, channels, sequence].
            dt: As `hidden_states`, before its softplus.
            A: [channels, N].
            B: [batch, N, sequence].
            C: As `B`.
            D: How much of its input a channel adds to its output [channels].
            z: What gates the output, before its SiLU, as `hidden_states`.
            delta_bias: Added to `dt` [channels].
        """
        layer, index = self._convolved
        x, steps = hidden_states.mT, softplus(dt.mT + delta_bias)  # [batch, sequence, channels]
        channels, size = A.shape
        past = layer.recurrent_states[index]
        if past is None:
            past = x.new_zeros(x.shape[0], channels, size, 1)
        query, key = (rows.mT.repeat(1, 1, channels) for rows in (C, B))
        decay = (steps[..., None] * A).flatten(2)
        made, state = torch.ops.alloc_moe.linear_attention(
            query, key, x * steps, past, decay, None, "gated", channels, 1.0
        )
        return ((made + x * D) * silu(z.mT)).mT, state


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what transformers' gated delta rule does, output and last state.

    Args:
        query: [batch, sequence, key heads, K], to be normalised.
        key: As `query`.
        value: [batch, sequence, heads, V]; each key head serves as many of them in a row.
        g: The logarithm of the decay [batch, sequence, heads], or of that of each channel
            [batch, sequence, heads, K].
        beta: How much of what a key recalls is replaced [batch, sequence, heads].
        initial_state: [batch, heads, K, V]; zeros if None.
    """
    heads, size = value.shape[2], key.shape[-1]
    query, key = (_over_heads(_normalised(rows), heads) for rows in (query, key))
    if initial_state is None:
        initial_state = value.new_zeros(value.shape[0], heads, size, value.shape[-1])
    made, state = torch.ops.alloc_moe.linear_attention(
        query.flatten(2),
        key.flatten(2),
        value.flatten(2),
        initial_state,
        g.to(value.dtype).flatten(2),
        beta,
        "gated_delta",
        heads,
        size**-0.5,
    )
    return made.unflatten(2, (heads, -1)), state


def scan_heads(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # noqa: N803, as transformers calls them
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    *,
    D: torch.Tensor,  # noqa: N803
    dt_bias: torch.Tensor,
    initial_states: torch.Tensor | None,
    dt_limit: tuple[float, float],
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what transformers' scan of Mamba-2 does, output and last state.

    Args:
        hidden_states: [batch, sequence, heads, P].
        dt: [batch, sequence, heads], before its softplus.
        A: [heads].
        B: [batch, sequence, groups, N]; each group serves as many heads in a row.
        C: As `B`.
        D: How much of its input a head adds to its output [heads].
        dt_bias: Added to `dt` [heads].
        initial_states: [batch, heads, N, P], which is transposed to transformers'; zeros if None.
        dt_limit: The least and the largest `dt`.
    """
    heads = hidden_states.shape[2]
    steps = softplus(dt + dt_bias)
    if tuple(dt_limit) != (0.0, math.inf):
        steps = steps.clamp(*dt_limit)
    query, key = (_over_heads(rows, heads) for rows in (C, B))
    if initial_states is None:
        size, width = B.shape[-1], hidden_states.shape[-1]
        initial_states = hidden_states.new_zeros(hidden_states.shape[0], heads, size, width)
    made, state = torch.ops.alloc_moe.linear_attention(
        query.flatten(2),
        key.flatten(2),
        (hidden_states * steps[..., None]).flatten(2),
        initial_states,
        steps * A,
        None,
        "gated",
        heads,
        1.0,
    )
    return made.unflatten(2, (heads, -1)) + D[:, None] * hidden_states, state


def _only_shaped(state: torch.Tensor, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
    """Stand for one step of a recurrence where only the cache of a prompt is wanted."""
    return torch.zeros_like(hidden_states)


def _normalised(rows: torch.Tensor) -> torch.Tensor:
    return rows * torch.rsqrt(rows.square().sum(-1, keepdim=True) + _NORM_EPSILON)


def _over_heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat [batch, sequence, groups, size] for the heads of each group."""
    times = heads // rows.shape[2]
    return rows if times == 1 else rows.repeat_interleave(times, dim=2)
