"""Loss of a model on a text, and the experts it really executed for it.

The text is one sequence of tokens, taken in windows of ``window`` tokens that start every
``stride`` tokens. Each window is one call with a batch of one. It scores the tokens that no earlier
window scored: the first window all but its first token, which has no context, others their last.
So each token but the first is scored once, in a context of at least ``window - stride`` tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.calls import Output, Session
from alloc_moe.runtime.text.hold import Hold, parts, run_held

LogitsFunction = Callable[[NDArray[np.int64]], NDArray[np.floating]]
"""Token ids [1, sequence] -> logits [1, sequence, vocabulary]."""

_DEFAULT_WINDOW = 512
_ROWS = 64  # logits handled at a time, so that a large vocabulary needs little memory


@dataclass(frozen=True)
class Window:
    """One call: tokens ``start`` to ``stop``; those from ``first_scored`` on are scored."""

    start: int
    stop: int
    first_scored: int


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    ``loss`` is the mean negative log-likelihood in nats of the ``tokens_scored``. ``tokens_run``
    are the tokens fed in all calls together, context included: ``activations`` are the experts that
    each MoE layer executed for those, None if they weren't counted.
    """

    loss: float
    tokens_scored: int
    tokens_run: int
    window: int
    stride: int
    activations: tuple[int, ...] | None = None

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that overflows, NaN where that is."""
        return math.inf if self.loss > 700 else math.exp(self.loss)

    @property
    def activations_per_token(self) -> tuple[float, ...] | None:
        """Experts per token that each MoE layer executed on average."""
        if self.activations is None:
            return None
        return tuple(count / self.tokens_run for count in self.activations)


def evaluate(
    logits_of: LogitsFunction,
    ids: Sequence[int] | NDArray[np.integer],
    *,
    window: int,
    stride: int,
    on_scored: Callable[[int], None] | None = None,
) -> Evaluation:
    """Return the loss of any model on a text.

    Args:
        logits_of: The model. It is called once per window.
        ids: The text's tokens, two or more.
        window: Tokens per call, two or more.
        stride: Tokens from one window's start to the next one's, less than ``window``.
        on_scored: Called after each window with the number of tokens it scored.

    Raises:
        GenerationError: The text is too short, or window and stride don't fit together.
    """
    tokens = np.asarray(ids, np.int64)
    total, run = 0.0, 0
    for part in windows(len(tokens), window=window, stride=stride):
        logits = logits_of(tokens[None, part.start : part.stop])[0]
        first = part.first_scored - part.start
        losses = token_losses(logits[first - 1 : -1], tokens[part.first_scored : part.stop])
        total += float(losses.sum())
        run += part.stop - part.start
        if on_scored is not None:
            on_scored(len(losses))
    scored = len(tokens) - 1
    return Evaluation(total / scored, scored, run, window, stride)


def evaluate_artifact(
    session: Session,
    ids: Sequence[int] | NDArray[np.integer],
    *,
    window: int | None = None,
    stride: int | None = None,
    decode: bool = False,
    price: float | None = None,
    hold: Hold | None = None,
    on_scored: Callable[[int], None] | None = None,
    on_output: Callable[[Output], None] | None = None,
) -> Evaluation:
    """Return the loss of an artifact on a text, and the activations of the very same calls.

    Args:
        session: From `open_session`; with ``count_activations=True`` activations are counted.
        ids: The text's tokens.
        window: Tokens per window; by default `default_window` of the model's context length.
        stride: Tokens from window to window; by default half of ``window``.
        decode: Feed each window token by token through the cache, as generation does, instead of in
            one call. Tokens then compete for experts with none but themselves.
        price: Of an activation, for artifacts with a dial; see `price_of` in `artifact.dial`.
        hold: In its place what sets the price, from `HeldBudget.begin` in `text.hold`. It goes on
            from window to window, and has each fed piece by piece as prompts are.
        on_scored: Called after each window with the number of tokens it scored.
        on_output: Called with what each call gave.

    Raises:
        GenerationError: The text is too short, or the window longer than the model's context.
    """
    limit = session.context_length
    window = default_window(limit) if window is None else window
    if limit is not None and window > limit:
        raise GenerationError(
            f"A window of {window} tokens doesn't fit into the model's context of {limit}."
        )
    counts = np.zeros(len(session.plan.layers), np.int64)
    run = functools.partial(session.run, price=price)
    if hold is not None:
        run = functools.partial(run_held, session, hold)

    def logits_of(tokens: NDArray[np.int64]) -> NDArray[np.floating]:
        width = tokens.shape[1]
        logits, cache = [], session.empty_cache(1, capacity=width)
        for step in np.split(tokens, _cuts(width, decode=decode, held=hold is not None), axis=1):
            output = run(step, cache=cache)
            logits.append(output.logits)
            if on_output is not None:
                on_output(output)
            if output.activations is not None:
                counts[:] += output.activations
        return logits[0] if len(logits) == 1 else np.concatenate(logits, axis=1)

    result = evaluate(
        logits_of,
        ids,
        window=window,
        stride=max(window // 2, 1) if stride is None else stride,
        on_scored=on_scored,
    )
    if not session.counts_activations:
        return result
    return dataclasses.replace(result, activations=tuple(counts.tolist()))


def _cuts(width: int, *, decode: bool, held: bool) -> Sequence[int]:
    """Return the columns of a window that calls begin at, but for the first."""
    if decode:
        return range(1, width)
    return [part.start for part in parts(width)[1:]] if held else ()


def default_window(context_length: int | None) -> int:
    """Return the window for a model: its context, 512 tokens at most."""
    return min(_DEFAULT_WINDOW, context_length or _DEFAULT_WINDOW)


def windows(count: int, *, window: int, stride: int) -> Iterator[Window]:
    """Yield the windows of a text of ``count`` tokens; they score tokens 1 to count - 1 once each.

    Raises:
        GenerationError: The text is too short, or window and stride don't fit together.
    """
    if count < 2:
        raise GenerationError(f"The text has {count} tokens; 2 are needed to score one.")
    if not 1 <= stride < window:
        raise GenerationError(
            f"Windows of {window} tokens every {stride} leave tokens without context. "
            "Give a stride of 1 or more that is less than the window."
        )
    start, scored = 0, 1
    while scored < count:
        stop = min(start + window, count)
        yield Window(start, stop, scored)
        start, scored = start + stride, stop


def token_losses(logits: NDArray[np.floating], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the negative log-likelihood in nats of each target [n] under its logits [n, vocab]."""
    losses = np.empty(len(targets))
    for first in range(0, len(targets), _ROWS):
        rows = logits[first : first + _ROWS].astype(np.float32)
        picked = np.take_along_axis(rows, targets[first : first + _ROWS, None], axis=1)[:, 0]
        largest = rows.max(axis=1)
        with np.errstate(invalid="ignore"):  # infinite logits give a loss of NaN
            sums = np.exp(rows - largest[:, None]).sum(axis=1, dtype=np.float64)
            losses[first : first + _ROWS] = np.log(sums) + largest.astype(np.float64) - picked
    return losses
