"""Latent attention in words that export plainly.

transformers writes keys into an empty tensor, and rotates some of them as complex numbers. Either
becomes dozens of nodes per layer. Here the same numbers come by one concatenation, and by pairs.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from alloc_moe.compiler.model.architectures import latent_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COMPLEX_ROTATION = "apply_rotary_emb"


@contextlib.contextmanager
def plain_latent_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model with latent attention compute it by operators that ONNX has, inside the block."""
    layers = list(latent_attention(model).values())
    sources = {sys.modules[type(layer).__module__] for layer in layers}
    with contextlib.ExitStack() as stack:
        for layer in layers:
            expand = functools.partial(expand_latents, layer)
            stack.enter_context(mock.patch.object(layer, "expand_kv", expand))
        for source in sources:
            if hasattr(source, _COMPLEX_ROTATION):
                stack.enter_context(mock.patch.object(source, _COMPLEX_ROTATION, rotate_pairs))
        yield


def expand_latents(
    layer: Any, latents: torch.Tensor, rotated: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the layer's ``expand_kv`` does.

    Args:
        layer: An attention layer of transformers.
        latents: [batch, 1, columns, rank].
        rotated: What all heads share of the keys [batch, 1, columns, rotated size].

    Returns:
        Keys and values [batch, heads, columns, size]; keys end with what is shared.
    """
    batch, _, columns, _ = latents.shape
    sizes = [layer.qk_nope_head_dim, layer.v_head_dim]
    expanded = layer.kv_b_proj(latents).view(batch, columns, -1, sum(sizes)).transpose(1, 2)
    own, values = expanded.split(sizes, dim=-1)
    return torch.cat([own, rotated.expand(-1, own.shape[1], -1, -1)], dim=-1), values


def rotate_pairs(
    query: torch.Tensor, key: torch.Tensor, angles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate elements 2i and 2i + 1 together, as complex numbers of absolute value 1 say.

    The result has the first of all pairs, then the second: another order than transformers', the
    same in queries and keys, so that their products stay.

    Args:
        query: [batch, heads, sequence, size].
        key: [batch, 1, sequence, size].
        angles: [batch, sequence, size / 2], complex.
    """
    cosine, sine = angles.real.unsqueeze(1), angles.imag.unsqueeze(1)

    def rotated(states: torch.Tensor) -> torch.Tensor:
        first, second = states[..., 0::2], states[..., 1::2]
        pairs = [first * cosine - second * sine, second * cosine + first * sine]
        return torch.cat(pairs, dim=-1).to(states.dtype)

    return rotated(query), rotated(key)
