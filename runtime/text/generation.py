"""Token ids in, token ids out: one prefill call, then one call per new token of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.cache import Cache
from alloc_moe.runtime.execution.calls import Output, Session
from alloc_moe.runtime.execution.finite import is_whole
from alloc_moe.runtime.execution.inputs import prompt_ids
from alloc_moe.runtime.text.hold import Hold, executed_by_token, prefill_apart
from alloc_moe.runtime.text.sampling import Sampling, sample

_PAD = 0  # any token: the attention mask keeps it out
GREEDY = Sampling()

Step = Callable[[NDArray[np.int64], NDArray[np.int64], Any], tuple[NDArray[np.floating], Any]]
"""``step(ids [batch, sequence], mask [batch, past + sequence], cache)`` -> logits, cache.

Logits may be of the last positions only.
"""


def generate(
    session: Session,
    prompts: Iterable[ArrayLike],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_ids: Collection[int] | None = None,
    price: float | None = None,
    holds: Sequence[Hold] | None = None,
    on_token: Callable[[int, int], object] | None = None,
    on_output: Callable[[Output], None] | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, the one that ended it included.

    Arguments and errors are those of `generate_steps`. ``on_token(row, token)`` is called for every
    token as soon as it is known; if it returns True, the row ends.
    """
    given = prompt_ids(prompts)
    rows: list[list[int]] = [[] for _ in given]
    stopped: set[int] = set()
    steps = generate_steps(
        session,
        given,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
        price=price,
        holds=holds,
        stops=lambda row: row in stopped,
        on_output=on_output,
    )
    for tokens in steps:
        for row, token in enumerate(tokens):
            if token is not None:
                rows[row].append(token)
                if on_token is not None and on_token(row, token) is True:
                    stopped.add(row)
    return rows


def generate_steps(
    session: Session,
    prompts: Iterable[ArrayLike],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_ids: Collection[int] | None = None,
    price: float | None = None,
    holds: Sequence[Hold] | None = None,
    stops: Callable[[int], bool] | None = None,
    on_output: Callable[[Output], None] | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, step by step; None for a row that has ended.

    Shorter prompts are padded on the left. The padding, and what is fed to rows that have ended,
    is masked out: no token attends to it, and it doesn't compete for experts. Under the
    redistribution ``batch``, or with a cap, the real tokens of a call do compete, so there (and
    only there) a row's tokens may depend on the other prompts.

    Args:
        session: An artifact from `open_session`.
        prompts: The token ids of each prompt, lists or arrays.
        max_new_tokens: The most tokens a row gets.
        sampling: How tokens are chosen; greedy by default.
        eos_ids: Tokens that end a row; by default those that the model's configuration names.
        price: Of an activation, for artifacts with a dial; see `price_of` in `artifact.dial`.
        holds: In its place what sets the price of each prompt, from `HeldBudget.begin`. Prompts are
            then computed one by one, so that no row depends on the others.
        stops: Asked after every step as ``stops(row)`` whether a row ends for another reason.
        on_output: Called with what every call of the session gave.

    Raises:
        GenerationError: A prompt is empty, too long, or has ids that the model doesn't know; or
            sequences can't have prices of their own, or aren't as many as `holds`.
    """
    prompts = prompt_ids(prompts)
    check_prompts(session, prompts, max_new_tokens=max_new_tokens)
    if holds is not None and len(holds) != len(prompts):
        raise GenerationError(
            f"{len(holds)} budgets are held for {len(prompts)} prompts. Give one hold for each."
        )
    max_new_tokens = int(max_new_tokens)  # numpy's may be too small for the sums below
    if not prompts:
        return
    ends = session.files.eos_ids() if eos_ids is None else eos_ids
    columns = max(len(prompt) for prompt in prompts) + max_new_tokens
    room = None if holds else session.empty_cache(len(prompts), capacity=columns)

    def step(
        tokens: NDArray[np.int64], mask: NDArray[np.int64], cache: Cache | None
    ) -> tuple[NDArray[np.floating], Cache]:
        if cache is None and holds:
            return prefill_apart(session, prompts, holds, capacity=columns, on_output=on_output)
        output = session.run(
            tokens,
            attention_mask=mask,
            cache=cache or room,
            price=[hold.price for hold in holds] if holds else price,
            logits_to_keep=1,
        )
        if holds:
            _observe(holds, output, mask[:, -1])
        if on_output is not None:
            on_output(output)
        return output.logits, output.cache

    yield from decode(
        step,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        is_last=lambda row, token: token in ends or (stops is not None and stops(row)),
    )


def _observe(holds: Sequence[Hold], output: Output, real: NDArray[np.int64]) -> None:
    """Tell each row's hold which experts ran for its one token, unless that is padding."""
    for hold, executed, new in zip(holds, executed_by_token(output), real, strict=True):
        hold.observe(int(new), int(executed * new))


def decode(
    step: Step,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    is_last: Callable[[int, int], bool],
) -> Iterator[list[int | None]]:
    """Yield what `generate_steps` does, of any model and for any rule that ends a row.

    Args:
        step: The model; the cache it gets is None at first, then what it gave the call before.
        prompts: The token ids of each prompt: at least one prompt, and none empty.
        max_new_tokens: The most tokens a row gets.
        sampling: How tokens are chosen.
        is_last: Told every new token as ``is_last(row, token)``, it says whether the row ends.
    """
    generators = sampling.generators(len(prompts))
    column = max(len(prompt) for prompt in prompts)
    tokens = np.full((len(prompts), column), _PAD, np.int64)
    mask = np.zeros((len(prompts), column + max_new_tokens), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, column - len(prompt) :] = prompt
        mask[row, column - len(prompt) : column] = 1
    ended = np.zeros(len(prompts), bool)
    seen = [set(prompt) for prompt in prompts]
    cache = None
    for _ in range(max_new_tokens):
        logits, cache = step(tokens, mask[:, :column], cache)
        chosen = sample(logits[:, -1], sampling, generators, seen)
        yield [None if end else int(token) for token, end in zip(chosen, ended, strict=True)]
        ended |= [not ended[row] and is_last(row, int(token)) for row, token in enumerate(chosen)]
        if ended.all():
            return
        for row, token in enumerate(chosen):
            seen[row].add(int(token))
        mask[:, column] = ~ended
        column += 1
        tokens = np.where(ended, _PAD, chosen)[:, None]


def check_prompts(
    session: Session, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
) -> None:
    """Raise GenerationError for what the model can't take."""
    if not is_whole(max_new_tokens, 1):
        raise GenerationError(f"{max_new_tokens} new tokens were asked for. Ask for 1 or more.")
    limit = session.context_length
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise GenerationError(f"Prompt {number} has no tokens. Give it some text.")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise GenerationError(
                f"Prompt {number} has {len(prompt)} tokens and {max_new_tokens} new ones were "
                f"asked for; the model's context holds {limit} in all. "
                "Shorten the prompt or ask for fewer."
            )
        if (
            session.vocabulary is not None
            and not 0 <= min(prompt) <= max(prompt) < session.vocabulary
        ):
            raise GenerationError(
                f"Prompt {number} has a token id outside 0 to {session.vocabulary - 1}, the "
                "model's vocabulary. Its tokenizer belongs to another model."
            )
