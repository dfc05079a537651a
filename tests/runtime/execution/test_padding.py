"""Padding that moves to the right, and logits that come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from alloc_moe.runtime.execution.cache import Cache
from alloc_moe.runtime.execution.padding import goes_row_by_row, pad_right
from alloc_moe.runtime.execution.slots import find_slots

IDS = np.array([[7, 8, 9], [4, 5, 6]])


class Argument:
    name, type = "past_key_values.0.key", "tensor(float16)"
    shape = ("batch", 2, "past", 4)


def cache(real: list[int]) -> Cache:
    argument: onnxruntime.NodeArg = Argument()  # type: ignore[assignment]
    slots = find_slots([argument], batch="batch", shared=True, latent=False, path=Path("a.onnx"))
    found = Cache(slots, batch=len(real), capacity=16)
    longest = max(real)
    if longest:
        found.append((np.arange(longest) < np.array(real)[:, None]).astype(np.int64))
    return found


def test_tokens_move_left_and_logits_back() -> None:
    new = np.array([[0, 1, 0], [1, 0, 1]])
    right = pad_right(IDS, new, cache([0, 0]))
    assert right.ids.tolist() == [[8, 0], [4, 6]]
    assert right.mask.tolist() == [[1, 0], [1, 1]]
    assert right.positions.tolist() == [[0, 1], [0, 1]]
    logits = np.array([[[1.0], [2.0]], [[3.0], [4.0]]])
    assert right.spread(logits)[..., 0].tolist() == [[0, 1, 0], [3, 0, 4]]
    assert right.spread(logits, keep=2)[..., 0].tolist() == [[1, 0], [0, 4]]


def test_the_last_logits_of_each_row_come_back() -> None:
    new = np.array([[0, 0, 1], [1, 1, 1]])
    right = pad_right(IDS, new, cache([0, 0]))
    last_of_each = np.array([[[1.0]], [[2.0]]])
    assert right.spread(last_of_each, keep=1)[..., 0].tolist() == [[1], [2]]


def test_a_call_without_padding_is_as_it_was() -> None:
    right = pad_right(IDS, np.ones_like(IDS), cache([0, 0]))
    np.testing.assert_array_equal(right.ids, IDS)
    logits: NDArray[np.floating] = np.zeros((2, 3, 1))
    assert right.spread(logits) is logits


def test_rows_of_several_lengths_go_on_where_they_are() -> None:
    right = pad_right(IDS[:, :1], np.ones((2, 1), np.int64), cache([3, 1]))
    assert right.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert right.positions.tolist() == [[3], [1]]


def test_a_row_that_pauses_is_marked() -> None:
    right = pad_right(IDS[:, :1], np.array([[1], [0]]), cache([1, 2]))
    assert right.mask.tolist() == [[1, 1, 0], [1, 2, 0]]
    assert right.columns.tolist() == [[0], [-1]]


@pytest.mark.parametrize(
    ("past", "new", "apart"),
    [
        ([0, 0], [[1, 1], [1, 1]], False),
        ([2, 1], [[1, 1], [0, 1]], True),
        ([2, 1], [[0, 1], [1, 0]], False),
        ([2], [[1, 1]], False),
    ],
)
def test_several_rows_with_a_past_take_one_token_each(
    past: list[int], new: list[list[int]], apart: bool
) -> None:
    assert goes_row_by_row(np.array(new), cache(past)) is apart
