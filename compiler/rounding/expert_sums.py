"""Tokens that a router sends to experts -> the sums that their weights are rounded by."""

from __future__ import annotations

from typing import Any

import torch

_OF_ALL = 0.5  # what the layer's mean expert adds to each one's own sums
_SAMPLE = 512  # tokens that stand for all of a layer, spread evenly


class ExpertSums:
    """Sums of x x' over the inputs x of single experts, each with the share of a token.

    Args:
        hidden: What the experts' layer is given [T, H].
        shares: How much a token counts for each expert [T, E], zero where it isn't sent there.
    """

    def __init__(self, hidden: torch.Tensor, shares: torch.Tensor) -> None:
        self._hidden, self._shares = hidden, shares
        mean = shares.mean(1)
        self._common = _OF_ALL * squares(hidden, mean)
        self._sample = torch.linspace(0, len(hidden) - 1, min(_SAMPLE, len(hidden))).long()
        self._sample_share = _OF_ALL * mean.sum() / len(self._sample)

    def gate_up(self, expert: int) -> torch.Tensor:
        """Return the sums [H, H] over what an expert is given."""
        sent, shares = self._sent(expert)
        return squares(self._hidden[sent], shares) + self._common

    def down(self, experts: Any, expert: int) -> torch.Tensor:
        """Return the sums [I, I] over what its down projection is given.

        Args:
            experts: The experts module, whose `gate_up_proj` is rounded already.
            expert: Which of them.
        """
        sent, shares = self._sent(expert)
        rows = self._hidden[torch.cat([sent, self._sample])]
        weight = experts.gate_up_proj[expert]
        inner = rows @ (weight if experts.is_transposed else weight.mT)
        if experts.has_bias:
            inner = inner + experts.gate_up_proj_bias[expert]
        shares = torch.cat([shares, self._sample_share.expand(len(self._sample))])
        return squares(experts._apply_gate(inner), shares)

    def _sent(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which tokens an expert is sent, and how much each counts."""
        sent = self._shares[:, expert].nonzero()[:, 0]
        return sent, self._shares[sent, expert]


def squares(inputs: torch.Tensor, shares: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sum of x x' [C, C] over inputs [T, C], each times its share [T] if given."""
    return inputs.mT @ (inputs if shares is None else inputs * shares[:, None])
