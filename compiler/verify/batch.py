"""The prompts that an artifact is verified on, and the calls that prefill and continue them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_PROMPT_LENGTHS = (23, 14, 5)
_DECODE_STEPS = 4

BATCH_TOKENS = sum(_PROMPT_LENGTHS) + len(_PROMPT_LENGTHS) * _DECODE_STEPS
"""The tokens that a batch is made of."""


@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts [3, longest], their mask, and the tokens to decode [3, steps]."""

    prompts: NDArray[np.int64]
    mask: NDArray[np.int64]
    decoded: NDArray[np.int64]

    @classmethod
    def of(cls, tokens: NDArray[np.int64]) -> PromptBatch:
        """Return the batch of `BATCH_TOKENS` tokens."""
        longest = max(_PROMPT_LENGTHS)
        prompts = np.zeros((len(_PROMPT_LENGTHS), longest), np.int64)
        mask = np.zeros_like(prompts)
        start = 0
        for row, length in enumerate(_PROMPT_LENGTHS):
            prompts[row, longest - length :] = tokens[start : start + length]
            mask[row, longest - length :] = 1
            start += length
        return cls(prompts, mask, tokens[start:].reshape(len(_PROMPT_LENGTHS), _DECODE_STEPS))

    def steps(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Return (input_ids, attention_mask) of each call."""
        ones = np.ones_like(self.decoded)
        calls = [(self.prompts, self.mask)]
        for step in range(self.decoded.shape[1]):
            mask = np.concatenate([self.mask, ones[:, : step + 1]], axis=1)
            calls.append((self.decoded[:, step : step + 1], mask))
        return calls

    def inputs(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return (input_ids, attention_mask, position_ids) of each call."""
        calls = []
        for ids, mask in self.steps():
            positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
            arrays = (ids.copy(), mask, positions.copy())
            calls.append(tuple(map(torch.from_numpy, arrays)))
        return calls  # type: ignore[return-value]

    def real(self, logits: Sequence[NDArray[np.floating]]) -> NDArray[np.float32]:
        """Return the logits of real tokens of all calls [tokens, vocabulary]."""
        first, *rest = logits
        return np.concatenate(
            [first[self.mask > 0], *(step[:, 0] for step in rest)], dtype=np.float32
        )
