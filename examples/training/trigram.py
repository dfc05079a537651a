"""Interpolated trigram model with modified Kneser-Ney smoothing: the baseline of the tiny model.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), found
it the best n-gram model of its time. It has nothing to tune: the discounts follow from the counts.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Order:
    """Shares of all n-grams of one length, and what their contexts leave to shorter n-grams.

    An n-gram is one integer, its words the digits in base ``vocab_size``. Keys and contexts are
    sorted; discounted belongs to keys, left_over to contexts.
    """

    keys: Ints
    discounted: Floats  # max(count - discount, 0) / total of the context
    contexts: Ints
    left_over: Floats  # mass that the discounts free in each context


@dataclass(frozen=True)
class Trigram:
    """A fitted model; orders holds unigrams, bigrams and trigrams."""

    vocab_size: int
    orders: tuple[Order, Order, Order]


def fit_trigram(tokens: npt.NDArray[np.uint16], vocab_size: int) -> Trigram:
    """Return the model of one stream of token ids.

    Longer n-grams count occurrences, shorter ones count the different words in front of them: a
    word that follows a single word only ("Francisco") is a bad guess in a new context.
    """
    words = tokens.astype(np.int64)
    trigrams, occurrences = np.unique(
        (words[:-2] * vocab_size + words[1:-1]) * vocab_size + words[2:], return_counts=True
    )
    bigrams, before_bigrams = np.unique(trigrams % vocab_size**2, return_counts=True)
    unigrams, before_unigrams = np.unique(bigrams % vocab_size, return_counts=True)
    return Trigram(
        vocab_size,
        (
            _fit_order(unigrams, before_unigrams, vocab_size),
            _fit_order(bigrams, before_bigrams, vocab_size),
            _fit_order(trigrams, occurrences, vocab_size),
        ),
    )


def _fit_order(keys: Ints, counts: Ints, vocab_size: int) -> Order:
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    contexts, inverse = np.unique(keys // vocab_size, return_inverse=True)
    totals = np.bincount(inverse, weights=counts)
    left_over = np.bincount(inverse, weights=discounts) / totals
    return Order(keys, (counts - discounts) / totals[inverse], contexts, left_over)


def _discounts(counts: Ints) -> Floats:
    """Return the discount of the counts 0, 1, 2 and 3 or more (equation 26 of the paper)."""
    once, twice, three, four = (max(1, int((counts == number).sum())) for number in (1, 2, 3, 4))
    shared = once / (once + 2 * twice)
    wanted = (
        0.0,
        1 - 2 * shared * twice / once,
        2 - 3 * shared * three / twice,
        3 - 4 * shared * four / three,
    )
    # The estimate needs large counts of counts; a tiny text may give nonsense.
    return np.array([min(max(value, 0.0), 0.99 * index) for index, value in enumerate(wanted)])


def token_losses(model: Trigram, tokens: npt.NDArray[np.uint16]) -> Floats:
    """Return -log P in nats of each token but the first, given the (up to) two tokens before it."""
    words = tokens.astype(np.int64)
    size = model.vocab_size
    before = np.concatenate([words[:1], words[:-2]])  # the first target has one predecessor only
    targets, previous = words[1:], words[:-1]
    contexts = (np.zeros_like(targets), previous, before * size + previous)
    probability = np.full(len(targets), 1 / size)
    for order, context in zip(model.orders, contexts, strict=True):
        seen = _look_up(order.keys, order.discounted, context * size + targets, missing=0.0)
        left_over = _look_up(order.contexts, order.left_over, context, missing=1.0)
        probability = seen + left_over * probability
    return -np.log(probability)


def _look_up(keys: Ints, values: Floats, wanted: Ints, *, missing: float) -> Floats:
    position = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[position] == wanted, values[position], missing)


def perplexity(
    train: npt.NDArray[np.uint16], heldout: npt.NDArray[np.uint16], vocab_size: int
) -> float:
    """Return the perplexity of held-out tokens under the trigrams of the training tokens."""
    return math.exp(float(token_losses(fit_trigram(train, vocab_size), heldout).mean()))
