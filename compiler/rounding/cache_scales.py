"""Model + text -> what one step of an int8 cache is worth, channel by channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache

from alloc_moe.compiler.model.replay import DecoderStack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.passes.attention.quantize_cache import CacheScales

_STEPS = 127
_HEADROOM = 1.25  # other text has larger values; what lies beyond is clipped
_MAX_WINDOWS = 16


@torch.inference_mode()
def measure_cache_scales(moe: MoeModel, token_ids: NDArray[np.int64]) -> CacheScales:
    """Return the scales of every layer's keys and values, from the largest of them in a text.

    Rotary embedding turns a pair of a key's channels (i and i + size / 2) into each other as the
    position grows, so both get the length of the pair, which holds at positions beyond the text's.

    Args:
        moe: The model, whose router is left as trained.
        token_ids: The text [windows, tokens].
    """
    windows = [torch.from_numpy(window[None].copy()) for window in token_ids[:_MAX_WINDOWS]]
    largest: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for slot, keys, values in _keys_and_values(moe, windows):
        pairs = keys.square() + keys.roll(keys.shape[-1] // 2, -1).square()
        found = (pairs.amax((0, 2)).sqrt(), values.abs().amax((0, 2)))
        before = largest.get(slot, found)
        largest[slot] = (before[0].maximum(found[0]), before[1].maximum(found[1]))
    return {slot: (_scale(keys), _scale(values)) for slot, (keys, values) in largest.items()}


def _keys_and_values(
    moe: MoeModel, windows: Sequence[torch.Tensor]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield index, keys and values [1, heads, tokens, size] of a layer for each window in turn.

    All windows pass a layer before the next, so that layers on disk are read once.
    """
    stack = DecoderStack(moe.model, moe.layers[0])
    hidden: list[torch.Tensor | None] = [None] * len(windows)
    for layer in range(len(stack)):
        with stack.resident(layer):
            for index, ids in enumerate(windows):
                cache = DynamicCache()  # keeps all tokens, be the layer's window as it may
                hidden[index] = stack.run(
                    ids,
                    hidden[index],
                    start=layer,
                    stop=layer + 1,
                    context={"past_key_values": cache, "use_cache": True},
                )
                yield layer, cache.layers[layer].keys, cache.layers[layer].values


class RoundedCache(DynamicCache):  # type: ignore[misc]  # transformers has no types here
    """PyTorch's cache, with keys and values rounded as an int8 cache rounds them."""

    def __init__(self, scales: CacheScales) -> None:
        super().__init__()
        self._scales = {
            slot: [torch.from_numpy(scale)[:, None] for scale in pair]
            for slot, pair in scales.items()
        }

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [batch, heads, sequence, size]; return those of all columns."""
        states = zip((key_states, value_states), self._scales[layer_idx], strict=True)
        keys, values = (_rounded(state, scale) for state, scale in states)
        grown: tuple[torch.Tensor, torch.Tensor] = super().update(keys, values, layer_idx, *args)
        return grown


def _scale(largest: torch.Tensor) -> NDArray[np.float32]:
    scale: NDArray[np.float32] = (largest * (_HEADROOM / _STEPS)).clamp_min(1e-9).float().numpy()
    return scale


def _rounded(state: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (state / scale).round().clamp(-_STEPS - 1, _STEPS) * scale
