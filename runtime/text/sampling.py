"""Logits -> token ids: greedy, or drawn at a temperature from the most probable tokens."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.finite import check_finite, is_number

_NUCLEUS_GUESS = 1024  # most nuclei are smaller; sorting so few is quick


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    ``temperature`` 0 is greedy: the largest logit, the lowest id among equals. Else token i has the
    probability softmax(logits / temperature)[i], and one is drawn from the smallest set of most
    probable tokens whose probabilities sum to at least ``top_p``. Row r of a batch draws from its
    own stream of random numbers, made from (``seed``, r), so its tokens don't depend on the others.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise GenerationError(
                f"The temperature is {self.temperature}. Give 0 (greedy) or more, usually up to 1."
            )
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise GenerationError(
                f"top-p is {self.top_p}. Give a probability above 0; 1 keeps all tokens."
            )
        if self.temperature == 0 and self.top_p < 1:
            raise GenerationError(
                f"top-p {self.top_p} has no effect at temperature 0, which is greedy. "
                "Give a temperature too, such as 0.8."
            )
        if not isinstance(self.seed, numbers.Integral) or self.seed < 0:
            raise GenerationError(f"The seed is {self.seed}. Give a whole number, 0 or more.")

    def generators(self, rows: int) -> list[np.random.Generator]:
        """Return one random generator per row of a batch."""
        return [np.random.Generator(np.random.PCG64([int(self.seed), row])) for row in range(rows)]


def sample(
    logits: NDArray[np.floating],
    sampling: Sampling,
    generators: Sequence[np.random.Generator],
) -> NDArray[np.int64]:
    """Return one token id per row of logits [rows, vocabulary].

    Raises:
        ArtifactError: Logits are not numbers.
    """
    best: NDArray[np.int64] = logits.argmax(axis=-1)  # of a row with NaN: the first NaN
    check_finite(logits[np.arange(len(best)), best], "The model computed logits")
    if sampling.temperature == 0:
        return best
    return np.array(
        [
            _draw(row, sampling.temperature, sampling.top_p, generator.random())
            for row, generator in zip(logits, generators, strict=True)
        ]
    )


def nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Return the ids of the smallest set with at least a share top_p, below 1, of all weight.

    They come in order of falling weight, equals by id.
    """
    goal = top_p * weights.sum()
    size = len(weights)
    ids = np.arange(size)
    if size > _NUCLEUS_GUESS:
        least = np.partition(weights, size - _NUCLEUS_GUESS)[size - _NUCLEUS_GUESS]
        largest = np.flatnonzero(weights >= least)  # with all ties of the least
        if weights[largest].sum() >= goal:
            ids = largest
    ids = ids[np.argsort(-weights[ids], kind="stable")]
    return ids[: int(np.searchsorted(weights[ids].cumsum(), goal)) + 1]


def _draw(logits: NDArray[np.floating], temperature: float, top_p: float, uniform: float) -> int:
    """Return the token at which the nucleus' cumulative probability passes ``uniform``."""
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # at the least temperatures: exp(-inf) is 0 all the same
        weights = np.exp((scores - scores.max()) / temperature)
    ids = nucleus(weights, top_p) if top_p < 1 else np.arange(len(weights))
    cumulative = weights[ids].cumsum()
    return int(ids[np.searchsorted(cumulative, uniform * cumulative[-1], side="right")])
