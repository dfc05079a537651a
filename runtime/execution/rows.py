"""Batches whose sequences come and go: a cache made of rows of others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alloc_moe.runtime.execution.buffers import BFLOAT16, new_array
from alloc_moe.runtime.execution.cache import Cache
from alloc_moe.runtime.execution.calls import Session
from alloc_moe.runtime.execution.slots import CacheSlot

Row = tuple[Cache, int]
"""A cache and which of its sequences. The real tokens of one are its last columns."""


def moves_rows(session: Session) -> bool:
    """Whether sequences can be moved: numpy can't read a copied cache of bfloat16 from a GPU."""
    readable = all(slot.shared or slot.element_type != BFLOAT16 for slot in session.slots)
    return session.device == "cpu" or readable


def gather_rows(session: Session, rows: Sequence[Row], *, capacity: int = 0) -> Cache:
    """Return a new cache of sequences from others, which keep theirs.

    All end at the same column; shorter ones are padded on the left. Keys know the positions of
    their tokens, so they may stand in other columns than before.

    Args:
        session: The one that all the caches are of.
        rows: The sequences, one or more.
        capacity: Columns to have room for, if that is more than they need.
    """
    lengths = [_tokens(row) for row in rows]
    columns = max(lengths)
    cache = session.empty_cache(len(rows), capacity=max(capacity, columns))
    cache.reserve(columns)  # a cache of latents makes room in steps
    width = cache.capacity if cache.shared else columns
    sources = {id(source): source.arrays() for source, _ in rows}
    arrays = []
    for index, slot in enumerate(cache.slots):
        array = new_array(slot.shape(len(rows), width), slot.element_type)
        array.fill(0)
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            end = length if session.pads_right else columns
            source = sources[id(row[0])][index]
            array[_columns(slot, place, end - length, end)] = source[_source(session, slot, row)]
        arrays.append(array)
    mask = np.arange(columns) >= columns - np.array(lengths)[:, None]
    cache.hold(arrays, mask.astype(np.int64))
    for place, (given, sequence) in enumerate(rows):
        cache.states.replace(place, given.states, sequence)
    return cache


def replace_row(session: Session, cache: Cache, place: int, row: Row) -> bool:
    """Put a sequence where another of a batch was, without copying the rest; whether it can be.

    Args:
        session: The one that both caches are of.
        cache: The batch's.
        place: The row of the sequence that is no longer needed.
        row: The sequence to have there.
    """
    length, columns = _tokens(row), cache.length
    if not cache.replaces_rows or length > columns:
        return False
    end = length if session.pads_right else columns
    given = row[0].arrays()
    for slot, array, source in zip(cache.slots, cache.arrays(), given, strict=True):
        array[_columns(slot, place, end - length, end)] = source[_source(session, slot, row)]
    cache.replace_mask(place, length)
    cache.states.replace(place, row[0].states, row[1])
    return True


def _tokens(row: Row) -> int:
    cache, place = row
    return int(cache.real_tokens[place])


def _source(session: Session, slot: CacheSlot, row: Row) -> tuple[int | slice, ...]:
    cache, place = row
    end = _tokens(row) if session.pads_right else cache.length
    return _columns(slot, place, end - _tokens(row), end)


def _columns(slot: CacheSlot, row: int, start: int, end: int) -> tuple[int | slice, ...]:
    """Return the index of columns of one sequence."""
    index: list[int | slice] = [slice(None)] * len(slot.empty_shape)
    assert slot.past_axis is not None
    index[slot.batch_axis], index[slot.past_axis] = row, slice(start, end)
    return tuple(index)
