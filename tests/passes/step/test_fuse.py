"""Operations join what they belong to, and nothing else."""

from __future__ import annotations

from alloc_moe.passes.step.fuse import fuse
from alloc_moe.passes.step.parts import GateUp, Keep, Norm, Router, Shared
from alloc_moe.passes.step.records import (
    Add,
    AddBias,
    Embed,
    Experts,
    Linear,
    Op,
    RmsNorm,
    Route,
    ScaleRows,
    SwiGlu,
)

EMBED = Embed("table", "h", 8)
HEAD = Linear("last", "head", "logits", 20, 8)
NORM = RmsNorm("h", "scale", 1e-6, "n", 8)
TOP = Router(2, "softmax")


def moe(x: str, out: str) -> list[Op]:
    route = Route(x, "router", "routed1", 4, 8, TOP, Keep("top", k=1), "keep")
    return [route, Experts(x, "routed1", "up", "down", out, 8, 16)]


def test_a_norm_joins_all_products_of_it() -> None:
    ops = [EMBED, NORM, Linear("n", "a", "x", 8, 8), Linear("n", "b", "y", 8, 8)]
    ops += [Add("x", "y", "last", 8), HEAD]
    norm = Norm("scale", 1e-6)
    assert fuse(ops) == [
        EMBED,
        Linear("h", "a", "x", 8, 8, norm=norm),
        Linear("h", "b", "last", 8, 8, norm=norm, residual="x"),
        HEAD,
    ]


def test_a_norm_that_is_added_to_stays() -> None:
    ops = [EMBED, NORM, Linear("n", "a", "x", 8, 8), Add("n", "x", "last", 8), HEAD]
    assert fuse(ops) == [EMBED, NORM, Linear("n", "a", "last", 8, 8, residual="n"), HEAD]


def test_a_bias_joins_its_product() -> None:
    ops = [EMBED, Linear("h", "a", "x", 8, 8), AddBias("x", "b", "last", 8), HEAD]
    assert fuse(ops) == [EMBED, Linear("h", "a", "last", 8, 8, bias="b"), HEAD]


def test_a_product_that_is_read_twice_keeps_its_buffer() -> None:
    ops = [EMBED, Linear("h", "a", "x", 8, 8), Add("h", "x", "s", 8), Add("x", "s", "last", 8)]
    assert fuse([*ops, HEAD]) == [*ops, HEAD]


def test_what_nothing_needs_is_left_out() -> None:
    ops = [EMBED, Linear("h", "a", "x", 8, 8), Linear("h", "b", "last", 8, 8), HEAD]
    assert fuse(ops) == [EMBED, ops[2], HEAD]


def test_a_router_takes_the_norm_and_passes_it_on() -> None:
    ops = [EMBED, NORM, *moe("n", "e"), Add("h", "e", "last", 8), HEAD]
    route, experts = moe("n", "e")
    assert isinstance(route, Route)
    assert isinstance(experts, Experts)
    found = fuse(ops)
    assert found[1] == Route(
        "h", "router", "routed1", 4, 8, TOP, Keep("top", k=1), "keep",
        norm=Norm("scale", 1e-6), normed="n",
    )  # fmt: skip
    assert found[2] == Experts("n", "routed1", "up", "down", "last", 8, 16, residual="h")
    assert len(found) == 4


def test_a_shared_expert_joins_the_chosen_ones() -> None:
    shared: list[Op] = [
        Linear("n", "g", "gate", 12, 8),
        Linear("n", "u", "up", 12, 8),
        SwiGlu("gate", "inner", 12, y="up"),
        Linear("inner", "d", "out", 8, 12),
        Linear("n", "s", "share", 1, 8),
        ScaleRows("out", "share", "scaled", 8),
    ]
    ops = [EMBED, NORM, *shared, *moe("n", "e"), Add("e", "scaled", "m", 8)]
    ops += [Add("h", "m", "last", 8), HEAD]
    found = fuse(ops)
    assert [op.op for op in found] == ["embed", "route", "experts", "linear"]
    experts = found[2]
    assert isinstance(experts, Experts)
    assert experts.shared == Shared(GateUp("g", "u"), "d", 12, gate="s")
    assert (experts.residual, experts.out) == ("h", "last")


def test_an_expert_of_other_values_stays_apart() -> None:
    dense: list[Op] = [
        Linear("h", "gu", "both", 24, 8),
        SwiGlu("both", "inner", 12),
        Linear("inner", "d", "out", 8, 12),
    ]
    ops = [EMBED, NORM, *dense, *moe("n", "e"), Add("e", "out", "last", 8), HEAD]
    found = fuse(ops)
    assert [op.op for op in found] == [
        *("embed", "route", "linear", "swiglu", "linear", "experts", "linear")
    ]
    experts = found[-2]
    assert isinstance(experts, Experts)
    assert (experts.shared, experts.residual) == (None, "out")
