"""Tokens that a router sends to experts -> the sums that their weights are rounded by."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alloc_moe.compiler.model.architectures import first_projection
from alloc_moe.compiler.rounding.gptq import restore_products

_OF_ALL = 0.5  # what the layer's mean expert adds to each one's own sums
_SAMPLE = 512  # tokens that stand for all of a layer, spread evenly


@dataclass(frozen=True)
class Sums:
    """Over inputs x of a product, which were y before anything was rounded: of x x', (y - x) x'.

    Both are [columns, columns], of several products [products, columns, columns].
    """

    hessian: torch.Tensor
    drift: torch.Tensor

    @classmethod
    def over(
        cls, inputs: torch.Tensor, floats: torch.Tensor, shares: torch.Tensor | None = None
    ) -> Sums:
        """Return the sums over inputs x and y [T, C], each token with its share [T] if given."""
        counted = inputs if shares is None else inputs * shares[:, None]
        return cls(inputs.mT @ counted, (floats - inputs).mT @ counted)

    @classmethod
    def stacked(cls, sums: Sequence[Sums]) -> Sums:
        """Return those of single products together."""
        return cls(
            torch.stack([each.hessian for each in sums]), torch.stack([each.drift for each in sums])
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.hessian + other.hessian, self.drift + other.drift)


def restoring(sums: Sums) -> torch.Tensor:
    """Return the product [C, C] that gives weights of these sums what `restore_products` does."""
    one = torch.eye(len(sums.hessian))[None]
    return restore_products(one, sums.hessian[None], sums.drift[None])[0]


class ExpertSums:
    """Sums over the inputs of single experts, each token with its share.

    ``common`` are what the layer's mean expert adds to those of each.

    Args:
        hidden: What the experts' layer is given [T, H].
        floats: What it was given before anything was rounded [T, H].
        shares: How much a token counts for each expert [T, E], zero where it isn't sent there.
    """

    def __init__(self, hidden: torch.Tensor, floats: torch.Tensor, shares: torch.Tensor) -> None:
        self._hidden, self._floats, self._shares = hidden, floats, shares
        mean = _OF_ALL * shares.mean(1)
        self.common = Sums.over(hidden, floats, mean)
        self._sample = torch.linspace(0, len(hidden) - 1, min(_SAMPLE, len(hidden))).long()
        self._sample_share = mean.sum() / len(self._sample)

    @functools.cached_property
    def restoring(self) -> torch.Tensor:
        """The product [H, H] that gives first projections what `restore_products` does.

        It is one for all experts: what enters them drifted alike.
        """
        return restoring(self.common)

    def gate_up(self, expert: int) -> torch.Tensor:
        """Return the sum of x x' over what an expert is given [H, H]."""
        sent, shares = self._sent(expert)
        hidden = self._hidden[sent]
        return hidden.mT @ (hidden * shares[:, None]) + self.common.hessian

    def down(self, experts: Any, expert: int, gate_up: torch.Tensor) -> Sums:
        """Return the sums over what its down projection is given.

        Args:
            experts: The experts module, whose first projection is rounded already.
            expert: Which of them.
            gate_up: Its weight before that, as the module has it.
        """
        rows, shares = self._sent_and_sample(expert)
        inner = self._inner(experts, expert, rows)
        floats = _inner(experts, expert, gate_up, self._floats[rows])
        return Sums.over(inner, floats, shares)

    def down_hessian(self, experts: Any, expert: int) -> torch.Tensor:
        """Return the sum of x x' over what its down projection is given, of those of `down`."""
        rows, shares = self._sent_and_sample(expert)
        inner = self._inner(experts, expert, rows)
        return inner.mT @ (inner * shares[:, None])

    def _inner(self, experts: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """Return what a down projection gets of tokens, once the first one is rounded."""
        rounded = getattr(experts, first_projection(experts))[expert]
        return _inner(experts, expert, rounded, self._hidden[rows])

    def _sent_and_sample(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens that an expert is sent and some of all, and how much each counts."""
        sent, shares = self._sent(expert)
        rows = torch.cat([sent, self._sample])
        return rows, torch.cat([shares, self._sample_share.expand(len(self._sample))])

    def _sent(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which tokens an expert is sent, and how much each counts."""
        sent = self._shares[:, expert].nonzero()[:, 0]
        return sent, self._shares[sent, expert]


def _inner(experts: Any, expert: int, gate_up: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return what the down projection gets [T, I] of hidden states [T, H]."""
    products = hidden @ (gate_up if experts.is_transposed else gate_up.mT)
    if experts.has_bias:
        products = products + getattr(experts, f"{first_projection(experts)}_bias")[expert]
    inner: torch.Tensor = (experts._apply_gate if experts.has_gate else experts.act_fn)(products)
    return inner
