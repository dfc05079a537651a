"""The shapes of a step program's JSON, field by field: a kernel's source is made of its numbers."""

from __future__ import annotations

import re
from typing import Any

from alloc_moe.runtime.artifact.shapes import (
    Shape,
    ShapeError,
    boolean,
    either,
    number,
    one_of,
    optional,
    record,
    rows,
    string,
    whole,
)

LANE = 8
"""Elements that sizes which kernels read at once are multiples of."""
_MOST_SIZE = 1 << 16  # of what kernels are compiled for, which takes longer the larger it is
_MOST_ROWS = 1 << 24
_BUFFER = re.compile(r"logits|[a-z]+[0-9]+")  # no name that plans have for buffers of their own


def buffer(value: Any, where: str) -> Any:
    """Take the name of a row of numbers."""
    if not isinstance(value, str) or len(value) > 64 or not _BUFFER.fullmatch(value):
        raise ShapeError(f"{where} names no buffer")
    return value


def multiple(of: int, most: int = _MOST_SIZE) -> Shape:
    """Take a size that can be divided by a number."""
    size = whole(of, most)

    def check(value: Any, where: str) -> Any:
        if size(value, where) % of:
            raise ShapeError(f"{where} is {value}, which is no multiple of {of}")
        return value

    return check


def bits(value: Any, where: str) -> Any:
    """Take how many bits a weight has where it is quantised."""
    if whole()(value, where) not in (4, 8):
        raise ShapeError(f"{where} is {value}, where 4 or 8 is expected")
    return value


_NAME = string()
_MAYBE_NAME = optional(_NAME)
_COUNT = whole(1, _MOST_SIZE)
_WIDTH = whole(1, _MOST_ROWS)
_LANES = multiple(LANE)
_FLAG = optional(boolean)
_FACTOR = optional(number(-1e30, 1e30))
_OFFSET = optional(either(whole(0, 0), multiple(LANE, _MOST_ROWS)))
_NORM = {"weight": _NAME, "eps": number(0, 1)}
_FORMAT = record({"bits": bits, "block": multiple(16), "scales": _NAME}, closed=True)
_MAYBE_FORMAT = optional(_FORMAT)
_SLICE = record({"buffer": buffer}, {"offset": _OFFSET}, closed=True)
_HEAD_NORM = optional(record(_NORM, {"whole": _FLAG, "offset": optional(whole(0, 0))}, closed=True))
_ROW_NORM = optional(record(_NORM, {"whole": _FLAG, "offset": optional(whole(0, 1))}, closed=True))
_ROTARY = optional(
    record({"cos": _NAME, "sin": _NAME, "size": multiple(2), "interleaved": boolean}, closed=True)
)
_KEEP = record(
    {"kind": one_of("top", "score", "pool")},
    {
        "k": optional(_COUNT),
        "score": optional(one_of("weight", "price", "overlap", "ratio", "top-p")),
        "sizes": _MAYBE_NAME,
        "twice_overlap": _FACTOR,
        "threshold": optional(number()),
        "dial": _FLAG,
        "quota": optional(number(0, _MOST_SIZE)),
        "token_sizes": optional(
            record({"matrix": _NAME, "bias": _NAME, "limit": number(0, 80)}, closed=True)
        ),
    },
    closed=True,
)
_GROUPS = optional(
    record({"count": whole(1, 32), "keep": whole(1, 32), "best": whole(1, 2)}, closed=True)
)
_PAIR = record({"gate": _NAME, "up": _NAME}, closed=True)
_PAIR_FORMAT = record({}, {"gate": _MAYBE_FORMAT, "up": _MAYBE_FORMAT}, closed=True)
_SHARED = optional(
    record(
        {"gate_up": either(_NAME, _PAIR), "down": _NAME, "intermediate": _LANES},
        {
            "gate": _MAYBE_NAME,
            "format": optional(
                record(
                    {},
                    {
                        "gate_up": optional(either(_FORMAT, _PAIR_FORMAT)),
                        "down": _MAYBE_FORMAT,
                    },
                    closed=True,
                )
            ),
        },
        closed=True,
    )
)
_EXPERT_FORMATS = optional(
    record({}, {"gate_up": _MAYBE_FORMAT, "down": _MAYBE_FORMAT}, closed=True)
)


def _shape(required: dict[str, Shape], other: dict[str, Shape] | None = None) -> Shape:
    return record({"op": _NAME, "out": buffer, **required}, other, closed=True)


_OPERATIONS = {
    "embed": _shape({"weight": _NAME, "n": _LANES}, {"format": _MAYBE_FORMAT, "scale": _FACTOR}),
    "linear": _shape(
        {"x": buffer, "weight": _NAME, "n": _WIDTH, "k": _LANES},
        {
            "bias": _MAYBE_NAME,
            "format": _MAYBE_FORMAT,
            "norm": _ROW_NORM,
            "residual": optional(buffer),
            "x_offset": _OFFSET,
        },
    ),
    "norm": _shape(
        {"x": buffer, **_NORM, "n": _LANES},
        {"offset": optional(whole(0, 1)), "size": optional(_LANES), "x_offset": _OFFSET},
    ),
    "attention": _shape(
        {
            "layer": whole(0, _MOST_SIZE),
            **dict.fromkeys("qkv", _SLICE),
            "heads": _COUNT,
            "kv_heads": _COUNT,
            "size": _LANES,
            "scale": number(-1e30, 1e30),
        },
        {
            "q_norm": _HEAD_NORM,
            "k_norm": _HEAD_NORM,
            "rotary": _ROTARY,
            "softcap": _FACTOR,
            "k_shared": optional(
                record({"buffer": buffer, "size": _LANES}, {"offset": _OFFSET}, closed=True)
            ),
        },
    ),
    "route": _shape(
        {
            "x": buffer,
            "weight": _NAME,
            "experts": _COUNT,
            "hidden": _LANES,
            "top_k": _COUNT,
            "score": one_of("softmax", "sigmoid", "softmax_after_top_k"),
            "keep": _KEEP,
            "weights": one_of("keep", "renorm"),
        },
        {
            "selection_bias": _MAYBE_NAME,
            "groups": _GROUPS,
            "renormalize": _FLAG,
            "renormalize_eps": optional(number(0, 1)),
            "scale": _FACTOR,
            "rounded_logits": _FLAG,
            "rounded": _FLAG,
            "bias": _MAYBE_NAME,
            "format": _MAYBE_FORMAT,
            "norm": _ROW_NORM,
            "normed": optional(buffer),
        },
    ),
    "experts": _shape(
        {
            "x": buffer,
            "routing": buffer,
            "gate_up": _NAME,
            "down": _NAME,
            "n": _LANES,
            "intermediate": _LANES,
        },
        {
            "gate_up_bias": _MAYBE_NAME,
            "down_bias": _MAYBE_NAME,
            "format": _EXPERT_FORMATS,
            "activation": optional(one_of("silu")),
            "residual": optional(buffer),
            "shared": _SHARED,
        },
    ),
    "swiglu": _shape({"x": buffer, "n": _LANES}, {"y": optional(buffer), "x_offset": _OFFSET}),
    "add": _shape({"x": buffer, "y": buffer, "n": _WIDTH}),
    "scale_rows": _shape({"x": buffer, "gate": buffer, "n": _WIDTH}),
}


def _operation(value: Any, where: str) -> Any:
    kind = record({"op": one_of(*_OPERATIONS)})(value, where)["op"]
    return _OPERATIONS[kind](value, where)


PROGRAM = record(
    {
        "format": whole(1, 1),
        "dtype": one_of("float16", "bfloat16", "float32"),
        "hidden": multiple(16),
        "vocabulary": _WIDTH,
        "kv": rows(
            record(
                {
                    "layer": whole(0, _MOST_SIZE),
                    "heads": _COUNT,
                    "key_size": _LANES,
                    "value_size": _LANES,
                },
                closed=True,
            )
        ),
        "ops": rows(_operation, least=1),
    },
    {"context_length": optional(whole(1, 1 << 30))},
    closed=True,
)
"""A step program; every name and number in it is of the kind that its place asks for."""
