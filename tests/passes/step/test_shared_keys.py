"""Products that repeat a row of keys for every head, in step programs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from alloc_moe.passes.step.parts import Norm, SharedKeys, Slice
from alloc_moe.passes.step.records import Attention, Linear, Op
from alloc_moe.passes.step.shared_keys import share_keys

HEADS, SIZE, SHARED, LATENTS = 2, 8, 4, 16
WIDTH = 2 * HEADS * SIZE
FIRST = Linear("b8", "first", "b0", LATENTS + SHARED, 1)
ASKED = Linear("b8", "asked", "b9", HEADS * SIZE, 1)
OWN = Linear("b0", "own", "b1", WIDTH, LATENTS)
REPEATED = Linear("b0", "repeated", "b2", WIDTH, SHARED, residual="b1", x_offset=LATENTS)
ATTENTION = Attention(
    0,
    Slice("b9"),
    Slice("b2"),
    Slice("b2", HEADS * SIZE),
    "b3",
    HEADS,
    HEADS,
    SIZE,
    1.0,
)


def _weight() -> NDArray[np.float32]:
    weight = np.zeros((2, HEADS, SIZE, SHARED), np.float32)
    weight[0, :, :SHARED] = np.eye(SHARED)
    return weight.reshape(WIDTH, SHARED)


def test_attention_reads_what_heads_share() -> None:
    expected = dataclasses.replace(
        ATTENTION,
        k=Slice("b1"),
        v=Slice("b1", HEADS * SIZE),
        k_shared=SharedKeys("b0", LATENTS, SHARED),
    )
    found = share_keys([FIRST, ASKED, OWN, REPEATED, ATTENTION], lambda name: _weight())
    assert found == [FIRST, ASKED, OWN, expected]


def test_all_layers_do() -> None:
    layer = [FIRST, ASKED, OWN, REPEATED, ATTENTION]
    renamed = {"b0": "c0", "b1": "c1", "b2": "c2", "b9": "c9"}

    def again(op: Linear | Attention) -> Op:
        if isinstance(op, Attention):
            parts = {name: getattr(op, name) for name in "qkv"}
            moved = {name: Slice(renamed[part.buffer], part.offset) for name, part in parts.items()}
            return dataclasses.replace(op, layer=1, out="c3", **moved)
        residual = renamed.get(op.residual or "")
        x = renamed.get(op.x, op.x)
        return dataclasses.replace(op, x=x, out=renamed[op.out], residual=residual)

    found = share_keys([*layer, *map(again, layer)], lambda name: _weight())
    assert [op.op for op in found] == ["linear", "linear", "linear", "attention"] * 2
    assert all(op.k_shared for op in found if isinstance(op, Attention))


@pytest.mark.parametrize("at", [(0, 1), (SHARED, 0), (HEADS * SIZE, 0)])
def test_other_weights_stay_products(at: tuple[int, int]) -> None:
    weight = _weight()
    weight[at] = 1.0
    ops: list[Op] = [FIRST, ASKED, OWN, REPEATED, ATTENTION]
    assert share_keys(ops, lambda name: weight) == ops


@pytest.mark.parametrize(
    ("product", "attention"),
    [
        (dataclasses.replace(REPEATED, bias="bias"), ATTENTION),
        (dataclasses.replace(REPEATED, norm=Norm("norm", 1e-6)), ATTENTION),
        (dataclasses.replace(REPEATED, residual=None), ATTENTION),
        (REPEATED, dataclasses.replace(ATTENTION, k_norm=Norm("norm", 1e-6))),
        (REPEATED, dataclasses.replace(ATTENTION, q=Slice("b2"))),
    ],
    ids=["bias", "norm", "alone", "normed keys", "another reader"],
)
def test_products_that_do_more_stay(product: Linear, attention: Attention) -> None:
    ops: list[Op] = [FIRST, ASKED, OWN, product, attention]
    assert share_keys(ops, lambda name: _weight()) == ops
