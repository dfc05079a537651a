"""What a call is given, checked: a mistake here would be computed with, and the answer be wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.cache import Cache


def token_ids(ids: ArrayLike, vocabulary: int | None) -> NDArray[np.int64]:
    """Return the token ids of a call [batch, sequence], one or more of each.

    Raises:
        GenerationError: They are none, of another shape, or of no token that the model knows.
    """
    array = _integers(ids, "The token ids")
    if array.ndim != 2 or not array.size:
        raise GenerationError(
            f"The token ids have the shape {list(array.shape)}. Give [batch, sequence], with one "
            "sequence or more and one token or more."
        )
    least, most = int(array.min()), int(array.max())
    if least < 0 or (vocabulary is not None and most >= vocabulary):
        wrong = least if least < 0 else most
        known = "0 or more" if vocabulary is None else f"from 0 to {vocabulary - 1}"
        raise GenerationError(f"The token id {wrong} is none of the model's, which are {known}.")
    return np.ascontiguousarray(array, np.int64)


def prompt_ids(prompts: Iterable[ArrayLike]) -> list[list[int]]:
    """Return the token ids of prompts, each a list or an array, as lists.

    Raises:
        GenerationError: They are no lists of whole numbers.
    """
    if isinstance(prompts, str | bytes):
        raise GenerationError("The prompts are one text. Give a list of prompts.")
    rows = []
    for number, prompt in enumerate(prompts, 1):
        array = _integers(prompt, f"Prompt {number}")
        if array.ndim != 1:
            raise GenerationError(
                f"Prompt {number} has the shape {list(array.shape)}. Give a list of token ids."
            )
        rows.append(array.tolist())
    return rows


def new_mask(
    mask: ArrayLike | None, ids: NDArray[np.int64], cache: Cache, context_length: int | None
) -> NDArray[np.int64]:
    """Return the mask of a call's own columns, for the cache that it goes on from.

    Raises:
        GenerationError: Mask, cache and ids don't belong together, or the context is too short.
    """
    batch, sequence = ids.shape
    if cache.batch != batch:
        raise GenerationError(
            f"The cache is for a batch of {cache.batch}, the call has {batch} sequences. "
            "Go on with the same batch, or begin with empty_cache()."
        )
    new = np.ones((batch, sequence), np.int64) if mask is None else _own(mask, sequence, cache)
    longest = int((cache.real_tokens + new.sum(axis=1)).max())
    if longest == 0:
        raise GenerationError(
            "The attention mask has only zeros, so no token of the call is real. "
            "Give 1 for real tokens."
        )
    if context_length is not None and longest > context_length:
        raise GenerationError(
            f"The call takes a sequence to {longest} tokens; the model's context holds "
            f"{context_length}. Begin a new cache, or give less."
        )
    return new


def _own(mask: ArrayLike, sequence: int, cache: Cache) -> NDArray[np.int64]:
    array = _array(mask, "The attention mask")
    shape = (cache.batch, cache.length + sequence)
    if array.shape != shape:
        raise GenerationError(
            f"The attention mask has the shape {list(array.shape)}, where {list(shape)} is "
            "expected: [batch, cached and new tokens]."
        )
    new = array[:, cache.length :]
    if ((new != 0) & (new != 1)).any():
        raise GenerationError(
            "The attention mask has other values than 0 and 1. Give 1 for real tokens, 0 for "
            "padding."
        )
    if (array[:, : cache.length] != cache.mask).any():
        raise GenerationError(
            "The attention mask says other than before which cached tokens are real. Give the "
            "columns of earlier calls as they were."
        )
    return np.asarray(new, np.int64)


def _integers(values: ArrayLike, what: str) -> NDArray[np.integer]:
    array = _array(values, what)
    if array.size and array.dtype.kind not in "iu":
        raise GenerationError(f"{what} are of type {array.dtype}. Give whole numbers.")
    return array.astype(np.int64, casting="unsafe") if not array.size else array


def _array(values: ArrayLike, what: str) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except (ValueError, OverflowError) as error:  # rows of several lengths; numbers too large
        raise GenerationError(f"{what} can't be made an array: {error}.") from error
