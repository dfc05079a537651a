"""Tokens of a text -> the sums that rows of the head are rounded by, group by group.

An error of a row is an error of one logit, which counts where the model might say that word: by the
softmax's second derivative p (1 - p). So each row has tokens of its own. Rows that are alike speak
in the same places; they are rounded together, by the tokens where one of them might be said.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.vq import kmeans2

from alloc_moe.compiler.rounding.expert_sums import Sums

_GROUPS = 64
_FEWEST = 16  # rows of a group, on average: small vocabularies have fewer groups
_SAMPLE = 1 << 14  # rows that groups are found on, spread evenly
_ROUNDS = 10  # of k-means, from rows drawn by a fixed seed
_LEAST = 1e-6  # mean share of a token: groups never said go by all tokens alike
_MOST = 1 << 22  # elements of the inputs that a group of rows has of its own
_OF_ALL = 0.5  # what all tokens alike add to a group's own


@dataclass(frozen=True)
class SaidTokens:
    """What enters the head on a text, and where groups of its rows might be said.

    Attributes:
        inputs: With what is rounded so far [T, C].
        floats: As trained [T, C].
        shares: How much a token counts for each group [T, G].
    """

    inputs: torch.Tensor
    floats: torch.Tensor
    shares: torch.Tensor

    @classmethod
    def of(
        cls, inputs: torch.Tensor, floats: torch.Tensor, logits: torch.Tensor, groups: torch.Tensor
    ) -> SaidTokens:
        """Return those of tokens with these logits as trained [T, V], of rows in `groups` [V]."""
        said = logits.softmax(1)
        shares = torch.zeros(len(logits), int(groups.max()) + 1)
        return cls(inputs, floats, shares.index_add_(1, groups, said.mul_(1 - said)))

    @classmethod
    def together(cls, parts: Iterator[SaidTokens]) -> SaidTokens:
        """Return those of parts of a text as one."""
        found = [(part.inputs, part.floats, part.shares) for part in parts]
        return cls(*map(torch.cat, zip(*found, strict=True)))

    @functools.cached_property
    def common(self) -> Sums:
        """What all tokens alike add to the sums of each group."""
        return Sums.over(self.inputs, self.floats, torch.full((len(self.shares),), _OF_ALL))

    def hessians(self) -> Iterator[torch.Tensor]:
        """Yield the sum of x x' [C, C] of each group: a mean token's of its own, and the common.

        Its own are the tokens that count most, as many as are summed up in no time.
        """
        most = min(len(self.inputs), max(_MOST // self.inputs.shape[1], 1))
        for shares in self.shares.T:
            some = shares.topk(most, sorted=False).indices
            inputs = self.inputs[some]
            own = shares[some] / shares.mean().clamp(min=_LEAST)
            yield inputs.mT @ (inputs * own[:, None]) + self.common.hessian


def row_groups(weight: torch.Tensor) -> torch.Tensor:
    """Return the group [V] of each row of a head [V, C], from 0: rows of like direction together.

    The head's float weights tell, so that groups don't depend on a text. None is empty, as it is
    where rows are equal: those of words that were added to fill the vocabulary up.
    """
    count = max(1, min(_GROUPS, len(weight) // _FEWEST))
    directions = torch.nn.functional.normalize(weight - weight.mean(0), dim=1)
    spread = torch.linspace(0, len(weight) - 1, min(_SAMPLE, len(weight))).long()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        centers, _ = kmeans2(
            directions[spread].numpy(),
            count,
            iter=_ROUNDS,
            minit="points",
            rng=0,
            check_finite=False,
        )
    found = torch.from_numpy(centers)
    nearest = directions @ found.mT - found.square().sum(1) / 2
    _, groups = np.unique(nearest.argmax(1).numpy(), return_inverse=True)
    return torch.from_numpy(groups)
