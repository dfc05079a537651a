"""What every session of an artifact offers, whatever runs it, and how its calls begin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from alloc_moe.runtime.artifact.dial import Price
from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.cache import Cache
from alloc_moe.runtime.execution.finite import is_number, is_whole
from alloc_moe.runtime.execution.inputs import new_mask, token_ids

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from alloc_moe.runtime.artifact.files import ArtifactFiles
    from alloc_moe.runtime.artifact.plan import AllocationPlan
    from alloc_moe.runtime.execution.slots import CacheSlot


@dataclass(frozen=True)
class Output:
    """What one call gave.

    ``logits`` are [batch, sequence, vocabulary], float32 or float16; of the last positions only if
    that was asked for. ``cache`` is the one that was given, grown. ``rows[l]`` are the experts
    executed per row of the MoE operator of layer l, None unless the session counts them: the rows
    are the call's tokens, padding included, or (token, expert) pairs if the artifact compacts them.
    """

    logits: NDArray[np.floating]
    cache: Cache
    rows: tuple[NDArray[np.int64], ...] | None

    @property
    def activations(self) -> tuple[int, ...] | None:
        """The experts executed per MoE layer, padding included; None unless counted."""
        return None if self.rows is None else tuple(int(counts.sum()) for counts in self.rows)


class Session(Protocol):
    """An artifact that runs. `ArtifactSession` says what its functions do."""

    @property
    def files(self) -> ArtifactFiles:
        """The artifact's."""

    @property
    def slots(self) -> Sequence[CacheSlot]:
        """The tensors of its cache."""

    @property
    def context_length(self) -> int | None:
        """The most tokens it takes, if that is known."""

    @property
    def vocabulary(self) -> int | None:
        """How many tokens it knows, if that is known."""

    @property
    def has_dial(self) -> bool:
        """Whether calls may have a price."""

    @property
    def takes_prices(self) -> bool:
        """Whether each sequence of a call may have a price of its own."""

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where it runs."""

    @property
    def pads_right(self) -> bool:
        """Whether its cache has each sequence's columns first, and padding after them."""

    @property
    def plan(self) -> AllocationPlan:
        """The plan that was compiled in."""

    @property
    def counts_activations(self) -> bool:
        """Whether every call says how many experts each layer executed."""

    def empty_cache(self, batch: int, *, capacity: int = 0) -> Cache:
        """Return the cache to start a batch with."""

    def run(
        self,
        input_ids: ArrayLike,
        *,
        attention_mask: ArrayLike | None = None,
        cache: Cache | None = None,
        price: float | Sequence[float] | None = None,
        logits_to_keep: int | None = None,
    ) -> Output:
        """Run one call: a whole prompt, a piece of it, or one token per sequence."""


def begin_call(
    session: Session,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None,
    cache: Cache | None,
    price: float | Sequence[float] | None,
    logits_to_keep: int | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], Cache, Price, int | None]:
    """Check a call, and return what it needs.

    Returns:
        Its token ids, the mask of its own columns, its cache with room for them, its price or those
        of its sequences if they differ, and of how many positions at the end it gives logits, None
        for all.

    Raises:
        GenerationError: What was given doesn't belong together.
    """
    if logits_to_keep is not None and not is_whole(logits_to_keep, 1):
        raise GenerationError(f"{logits_to_keep} logits can't be kept. Give 1 or more.")
    keep = None if logits_to_keep is None else int(logits_to_keep)  # of numpy's, -1 is 255
    ids = token_ids(input_ids, session.vocabulary)
    batch, sequence = ids.shape
    checked = checked_price(session, price, batch)
    if cache is None:
        cache = session.empty_cache(batch)
    elif not isinstance(cache, Cache) or not cache.is_of(session.slots):
        raise GenerationError(
            "The cache was made by another session. Give one of this session's empty_cache()."
        )
    new = new_mask(attention_mask, ids, cache, session.context_length)
    cache.states.check(new, cache.real_tokens, path=session.files.graph)
    cache.reserve(cache.length + sequence)
    return ids, new, cache, checked, keep


def check_room(batch: int, capacity: int) -> None:
    """Raise GenerationError for a cache that there can't be."""
    if not (is_whole(batch, 1) and is_whole(capacity, 0)):
        raise GenerationError(
            f"A cache for {batch} sequences and {capacity} columns can't be made. "
            "Give 1 sequence or more, and 0 columns or more."
        )


def checked_price(
    session: Session,
    price: Any,  # whatever a caller gives
    batch: int,
) -> Price:
    """Return a call's price, or those of its sequences if they differ.

    Raises:
        GenerationError: The artifact can't be run so.
    """
    if price is None:
        return None
    if not session.has_dial:
        raise GenerationError(
            f"{session.files.graph} has its budget compiled in, so it can't be run at another. "
            "Compile it with --redistribute price and no cap, or leave the budget out."
        )
    several = isinstance(price, Sequence | np.ndarray) and np.ndim(price) == 1
    prices = tuple(price) if several else (price,)
    if several and len(prices) != batch:
        raise GenerationError(
            f"There are {len(prices)} prices for {batch} sequences. Give one for all, or one each."
        )
    for each in prices:
        if not is_number(each) or not 0 <= each < math.inf:
            raise GenerationError(f"The price of an activation is {each}. Give 0 or more.")
    if len(set(prices)) == 1:
        return float(prices[0])
    check_prices(session, batch)
    return tuple(map(float, prices))


def check_prices(session: Session, batch: int) -> None:
    """Raise GenerationError if so many sequences of a call can't have prices of their own."""
    if batch > 1 and not session.takes_prices:
        raise GenerationError(
            f"{session.files.graph} takes one price per call, so {batch} sequences can't have "
            "prices of their own. Run one at a time, or compile an .onnx file with "
            "--price-per sequence."
        )
