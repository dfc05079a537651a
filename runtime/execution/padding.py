"""Calls of graphs whose rows begin with their tokens: padding goes right, and logits come back.

Callers may pad anywhere. A row's real tokens keep their order, so in the cache they are one after
another, whatever was between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.execution.cache import Cache

_PAUSED = 2  # in place of a row's last 1: its token of this call is padding


@dataclass(frozen=True)
class RightPadded:
    """A call's tokens, each row's real ones first.

    ``ids`` and ``positions`` are [batch, width], the width being that of the row with most real
    tokens; ``mask`` [batch, columns] covers the past; ``columns`` [batch, sequence] says which of
    the width each of the caller's columns is, -1 for padding.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    positions: NDArray[np.int64]
    columns: NDArray[np.int64]

    def inputs(self) -> dict[str, NDArray[np.int64]]:
        """Return what a graph takes of a call's tokens, by the input's name."""
        return {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "position_ids": self.positions,
        }

    def spread(
        self, logits: NDArray[np.floating], *, keep: int | None = None
    ) -> NDArray[np.floating]:
        """Return logits in the caller's columns, zeros for padding.

        Args:
            logits: [batch, kept, vocabulary], of each row's last so many real tokens, and rows of
                fewer begin with others; or of all of the width.
            keep: Return those of so many columns at the end; by default of all.
        """
        columns = self.columns if keep is None else self.columns[:, -keep:]
        batch, width = self.ids.shape
        kept = logits.shape[1]
        if kept < width:
            lengths = (self.columns >= 0).sum(axis=1, keepdims=True)
            columns = np.where(columns < 0, -1, columns - (lengths - kept))
        if columns.shape[1] == kept and (columns == np.arange(kept)).all():
            return logits
        spread = logits[np.arange(batch)[:, None], columns]
        spread[columns < 0] = 0
        return spread


def pad_right(ids: NDArray[np.int64], new: NDArray[np.int64], cache: Cache) -> RightPadded:
    """Return a call's tokens as such a graph takes them.

    Several rows with a past go on by one token at most, see `goes_row_by_row`.

    Args:
        ids: [batch, sequence].
        new: Which of them are real, of the same shape.
        cache: With the real tokens before.
    """
    batch = len(ids)
    counts, past = new.sum(axis=1), cache.real_tokens
    width = max(int(counts.max()), 1)
    columns = np.where(new > 0, new.cumsum(axis=1) - 1, -1)
    packed = np.zeros((batch, width), np.int64)
    rows, given = np.nonzero(new)
    packed[rows, columns[rows, given]] = ids[rows, given]
    # A row that pauses while others go on still is given one token, in a column that stays free.
    pauses = (counts == 0) & (past > 0)
    total = max(int((past + counts + pauses).max()), width)
    mask = (np.arange(total) < (past + counts)[:, None]).astype(np.int64)
    mask[pauses, past[pauses] - 1] = _PAUSED
    positions = past[:, None] + np.arange(width)
    return RightPadded(packed, mask, positions, columns)


def goes_row_by_row(new: NDArray[np.int64], cache: Cache) -> bool:
    """Whether a call must be run apart for each row: with a past, several take one token each."""
    batch = len(new)
    return batch > 1 and bool(cache.real_tokens.any()) and int(new.sum(axis=1).max()) > 1
