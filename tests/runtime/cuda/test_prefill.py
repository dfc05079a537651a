"""Plans of prompts: what blocks of a kernel may do at once."""

from __future__ import annotations

from typing import Any

import pytest

from alloc_moe.runtime.cuda.prefill import plan_prefill
from alloc_moe.runtime.cuda.records import Launch, Places, Rows

HEADS, SIZE = 48, 128
WIDTH = HEADS * SIZE


@pytest.mark.parametrize(
    ("norm", "is_one"),
    [(None, False), ({"whole": False}, False), ({"whole": True}, True)],
    ids=["no norm", "a norm of each head", "a norm of all"],
)
def test_queries_that_share_a_norm_are_rotated_by_one_block(
    norm: dict[str, bool] | None, is_one: bool
) -> None:
    parts = {part: {"buffer": "b1", "offset": at * WIDTH} for at, part in enumerate("qkv")}
    attention: dict[str, Any] = {
        "op": "attention",
        "out": "b2",
        "layer": 0,
        "heads": HEADS,
        "kv_heads": HEADS,
        "size": SIZE,
        "scale": 1.0,
        **parts,
    }
    if norm:
        attention["q_norm"] = {"weight": "norm", "eps": 1e-6, **norm}
    ops = [
        {"op": "embed", "out": "b0", "weight": "embedding", "n": 64},
        {"op": "linear", "out": "b1", "x": "b0", "weight": "qkv", "n": 3 * WIDTH, "k": 64},
        attention,
    ]
    places = Places(*[lambda *_: 0] * 5)
    rows = Rows(1, 4, 0, 0, 0, {0: 0}, {0: 0}, 4)
    work = plan_prefill({"hidden": 64, "ops": ops}, places, rows, most_shared=232_448)
    (append,) = (
        each for each in work if isinstance(each, Launch) and each.kernel.startswith("append")
    )
    assert (append.grid[1] == 1) is is_one
