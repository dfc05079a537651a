"""Logits -> token ids: greedy, or drawn at a temperature from the most probable tokens."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.finite import check_finite, is_number

_NUCLEUS_GUESS = 1024  # most nuclei are smaller; sorting so few is quick
_MOST_PENALTY = 1000.0


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in words that mean what they do in transformers.

    ``temperature`` 0 is greedy: the largest logit, the lowest id among equals. Else token i has the
    probability softmax(logits / temperature)[i], and one is drawn from the smallest set of most
    probable tokens whose probabilities sum to at least ``top_p``, without those whose probability
    is below ``min_p`` times the largest. Row r of a batch draws from its own stream of random
    numbers, made from (``seed``, r), so its tokens don't depend on the others.

    Before all that, the logits of tokens that the prompt or the answer has are divided by
    ``repetition_penalty`` if they are positive, and multiplied by it if not (Keskar et al., CTRL,
    arXiv 1909.05858).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise GenerationError(
                f"The temperature is {self.temperature}. Give 0 (greedy) or more, usually up to 1."
            )
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise GenerationError(
                f"top-p is {self.top_p}. Give a probability above 0; 1 keeps all tokens."
            )
        if not is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise GenerationError(
                f"min-p is {self.min_p}. Give a share of the likeliest token's probability, from "
                "0, which keeps all tokens, to 1."
            )
        penalty = self.repetition_penalty
        if not is_number(penalty) or not 0 < penalty <= _MOST_PENALTY:
            raise GenerationError(
                f"The repetition penalty is {penalty}. Give a number above 0 and "
                f"up to {_MOST_PENALTY:g}; 1 is none, usual ones go up to 1.3."
            )
        for name, value, neutral in (("top-p", self.top_p, 1), ("min-p", self.min_p, 0)):
            if self.temperature == 0 and value != neutral:
                raise GenerationError(
                    f"{name} {value} has no effect at temperature 0, which is greedy. "
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
    seen: Sequence[Iterable[int]] = (),
) -> NDArray[np.int64]:
    """Return one token id per row of logits [rows, vocabulary].

    Args:
        logits: Of the next token.
        sampling: How it is chosen.
        generators: Of each row, from `Sampling.generators`; a greedy choice needs none.
        seen: The token ids that each row has so far, which a repetition penalty needs.

    Raises:
        ArtifactError: Logits are not numbers.
    """
    if sampling.repetition_penalty != 1:
        logits = _penalised(logits, sampling.repetition_penalty, seen)
    best: NDArray[np.int64] = logits.argmax(axis=-1)  # of a row with NaN: the first NaN
    check_finite(logits[np.arange(len(best)), best], "The model computed logits")
    if sampling.temperature == 0:
        return best
    return np.array(
        [
            _draw(row, sampling, generator.random())
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


def _penalised(
    logits: NDArray[np.floating], penalty: float, seen: Sequence[Iterable[int]]
) -> NDArray[np.floating]:
    """Return logits with those of each row's seen tokens made less likely."""
    changed = logits.astype(np.float32)
    for row, tokens in zip(changed, seen, strict=True):
        ids = np.fromiter(tokens, np.int64)  # one that comes twice is changed once
        scores = row[ids]
        row[ids] = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))
    return changed


def _draw(logits: NDArray[np.floating], sampling: Sampling, uniform: float) -> int:
    """Return the token at which the kept tokens' cumulative probability passes ``uniform``."""
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # at the least temperatures: exp(-inf) is 0 all the same
        weights = np.exp((scores - scores.max()) / sampling.temperature)  # the largest is 1
    top_p, min_p = sampling.top_p, sampling.min_p
    ids = nucleus(weights, top_p) if top_p < 1 else np.arange(len(weights))
    if min_p > 0:
        ids = ids[weights[ids] >= min_p]
    cumulative = weights[ids].cumsum()
    return int(ids[np.searchsorted(cumulative, uniform * cumulative[-1], side="right")])
