"""Sequences that are decoded together, and come and go between steps.

Nothing here knows of requests, threads or the web.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.errors import ArtifactError
from alloc_moe.runtime.execution.cache import Cache
from alloc_moe.runtime.execution.calls import Output, Session
from alloc_moe.runtime.execution.rows import gather_rows, replace_row
from alloc_moe.runtime.text.hold import Hold, executed_by_token, prefill
from alloc_moe.runtime.text.sampling import Sampling, sample

_LEAST_CAPACITY = 64
_PAD = 0  # any token: the mask keeps it out


@dataclass(eq=False)
class Row:
    """One sequence: what it was asked, how it goes on, and what it has so far.

    ``stream`` is which of the sampling's streams of random numbers it draws from: the place that
    its prompt has among those of a call to `generate`. ``hold``, if there is one, sets the price in
    place of ``price``. ``executed`` [MoE layers] are the experts that were executed for its
    ``computed`` tokens, None unless the session counts them.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    price: float | None = None
    hold: Hold | None = None
    stream: int = 0
    ids: list[int] = field(default_factory=list)
    computed: int = 0
    executed: NDArray[np.int64] | None = None
    last_executed: NDArray[np.floating] | None = None  # per token, of the last call

    def __post_init__(self) -> None:
        self._generators = [self.sampling.generators(self.stream + 1)[-1]]
        self._seen = set(self.prompt_ids)

    def take(self, logits: NDArray[np.floating], computed: int, counts: Iterable[int]) -> int:
        """Choose and return the next token.

        Args:
            logits: [vocabulary].
            computed: The tokens that were computed for it.
            counts: The experts executed for them, per MoE layer; none if they aren't counted.
        """
        [token] = sample(logits[None], self.sampling, self._generators, [self._seen]).tolist()
        self.ids.append(token)
        self._seen.add(token)
        self.computed += computed
        if len(executed := np.fromiter(counts, np.int64)):
            self.executed = executed if self.executed is None else self.executed + executed
            self.last_executed = executed / computed
        return int(token)


def batch_of(session: Session, row: Row) -> Hashable:
    """Return what tells the batch of a sequence from others: those of one price share one.

    Sequences that hold their budgets share another where a call may have several prices; elsewhere
    each has its own.
    """
    if row.hold is None:
        return row.price
    return "held" if session.takes_prices else row


class Batch:
    """Sequences that share calls, see `batch_of`, each of which goes on by a token in every step.

    A place whose sequence has left is kept for the next one, so that one who joins costs a copy of
    its own columns only. All are copied together when there is no such place, when it is longer
    than those that are there, or before a step that half of the places would be free in.
    """

    def __init__(self, session: Session, price: float | None) -> None:
        self._session, self._price = session, price
        self._places: list[Row | None] = []
        self._cache: Cache | None = None

    @property
    def rows(self) -> list[Row]:
        """The sequences that are in it."""
        return [row for row in self._places if row is not None]

    def prefill(self, row: Row) -> Cache:
        """Compute a prompt, choose the token that follows, and return the cache to `join` with.

        Raises:
            AllocMoeError: The model can't be run.
        """
        ids = row.prompt_ids
        outputs: list[Output] = []
        if row.hold is not None:
            prefill(self._session, ids, row.hold, capacity=len(ids), on_output=outputs.append)
        else:
            cache = self._session.empty_cache(1, capacity=len(ids))
            outputs = [self._session.run([ids], cache=cache, price=self._price, logits_to_keep=1)]
        counts = map(sum, zip(*(output.activations or () for output in outputs), strict=True))
        row.take(outputs[-1].logits[0, -1], len(ids), counts)
        return outputs[-1].cache

    def join(self, row: Row, cache: Cache) -> None:
        """Have a sequence go on with the others from the next step on."""
        if self._cache is not None and None in self._places:
            place = self._places.index(None)
            if replace_row(self._session, self._cache, place, (cache, 0)):
                self._places[place] = row
                return
        self._gather([(row, (cache, 0))])

    def leave(self, row: Row) -> None:
        """Forget a sequence."""
        self._places[self._places.index(row)] = None
        if not self.rows:
            self._places, self._cache = [], None

    def step(self) -> dict[Row, ArtifactError]:
        """Choose the next token of every sequence.

        Returns:
            Those whose logits are no numbers, which are in it no more, and what to say of them.

        Raises:
            AllocMoeError: The model can't be run.
        """
        assert self._cache is not None
        is_full = self._cache.length == self._cache.capacity
        if is_full or 2 * len(self.rows) <= len(self._places):
            self._gather()
        active = np.array([[row is not None] for row in self._places], np.int64)
        tokens = np.array([[_PAD if row is None else row.ids[-1]] for row in self._places])
        output = self._session.run(
            tokens,
            attention_mask=np.concatenate([self._cache.mask, active], axis=1),
            cache=self._cache,
            price=self._prices(),
            logits_to_keep=1,
        )
        self._cache = output.cache
        failed = {}
        for place, row in enumerate(self._places):
            if row is None:
                continue
            if row.hold is not None:
                row.hold.observe(1, int(executed_by_token(output)[place]))
            try:
                row.take(output.logits[place, -1], 1, _counts_of(output, place))
            except ArtifactError as error:
                failed[row] = error
        for row in failed:
            self.leave(row)
        if failed and self.rows:
            self._gather()  # what is no number would reach the next who has its place
        return failed

    def _prices(self) -> float | list[float] | None:
        """Return the price of the next call, or those of its places."""
        holds = [None if row is None else row.hold for row in self._places]
        if not any(holds):
            return self._price
        return [0.0 if hold is None else hold.price for hold in holds]

    def _gather(self, new: Sequence[tuple[Row, tuple[Cache, int]]] = ()) -> None:
        """Copy all sequences to a cache without free places or columns."""
        parts = [
            (row, (self._cache, place))
            for place, row in enumerate(self._places)
            if row is not None and self._cache is not None
        ]
        parts += new
        longest = max(int(cache.real_tokens[place]) for _, (cache, place) in parts)
        capacity = max(_LEAST_CAPACITY, longest + longest // 2)
        self._cache = gather_rows(self._session, [source for _, source in parts], capacity=capacity)
        self._places = [row for row, _ in parts]


def _counts_of(output: Output, place: int) -> Iterable[int]:
    """Return the experts executed for a row's one token, per MoE layer, if they are counted."""
    return () if output.rows is None else (int(counts[place]) for counts in output.rows)
