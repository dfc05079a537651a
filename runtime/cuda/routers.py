"""What the kernels know of a router: the C structures `Router`, `Routing` of kernels/route.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

MOST_TOKENS = 16
MOST_CANDIDATES = 32
MOST_EXPERTS = 256

_SCORES = {"softmax": 0, "sigmoid": 1, "softmax_after_top_k": 2}
_KEEPS = {"top": 0, "score": 1, "pool": 2}
_KEPT_SCORES = {"weight": 0, "price": 1, "overlap": 2, "ratio": 3, "top-p": 4}


class Router(ctypes.Structure):
    """As `Router` in kernels/route.cu."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("selection_bias", "sizes", "price", "token_weights", "token_bias")
        ),
        ("quota", ctypes.c_double),
        *(
            (name, ctypes.c_float)
            for name in (
                *("threshold", "twice_overlap", "renormalize_epsilon", "scale"),
                "most_token_log",
            )
        ),
        *(
            (name, ctypes.c_int)
            for name in (
                *("experts", "candidates", "score", "groups", "kept_groups", "best_of_group"),
                *("renormalize", "rounded", "keep", "kept", "kept_score", "renormalize_kept"),
            )
        ),
    )


class Routing(ctypes.Structure):
    """As `Routing` in kernels/route.cu."""

    _fields_ = (
        ("count", ctypes.c_int),
        ("expert", ctypes.c_int * (MOST_TOKENS * MOST_CANDIDATES)),
        ("tokens", ctypes.c_int * (MOST_TOKENS * MOST_CANDIDATES)),
        ("weight", ctypes.c_float * MOST_TOKENS * (MOST_TOKENS * MOST_CANDIDATES)),
        ("shared", ctypes.c_float * MOST_TOKENS),
    )


def router_of(
    op: Mapping[str, Any],
    floats: Callable[[str], int],
    transposed: Callable[[str, int], int],
    price: int,
) -> Router:
    """Return the constants of a route operation.

    Args:
        op: The operation, see compiler's step programs.
        floats: Gives the address of an initializer as float32.
        transposed: Gives that of a matrix of so many columns, transposed, in the program's type.
        price: The address of each sequence's price, which can change from call to call.
    """
    keep, groups = op["keep"], op.get("groups") or {}
    scored, tokens = keep["kind"] == "score", keep.get("token_sizes") or {}
    return Router(
        selection_bias=floats(op["selection_bias"]) if op.get("selection_bias") else None,
        sizes=floats(keep["sizes"]) if keep.get("sizes") else None,
        price=price if keep.get("dial") else None,
        token_weights=transposed(tokens["matrix"], op["experts"]) if tokens else None,
        token_bias=floats(tokens["bias"]) if tokens else None,
        most_token_log=tokens.get("limit", 0.0),
        threshold=keep.get("threshold", 0.0),
        twice_overlap=keep.get("twice_overlap") or 0.0,
        quota=-1.0 if keep.get("quota") is None else keep["quota"],
        renormalize_epsilon=op.get("renormalize_eps") or 0.0,
        scale=1.0 if op.get("scale") is None else op["scale"],
        experts=op["experts"],
        candidates=op["top_k"],
        score=_SCORES[op["score"]],
        groups=groups.get("count", 1),
        kept_groups=groups.get("keep", 1),
        best_of_group=groups.get("best", 1),
        renormalize=bool(op.get("renormalize")),
        rounded=bool(op.get("rounded")),
        keep=_KEEPS[keep["kind"]],
        kept=keep.get("k", op["top_k"]),
        kept_score=_KEPT_SCORES[keep["score"]] if scored else 0,
        renormalize_kept=op.get("weights") == "renorm",
    )


def most_kept(op: Mapping[str, Any], tokens: int) -> int:
    """Return how many experts a step of so many tokens can need at most."""
    keep = op["keep"]
    each = keep["k"] if keep["kind"] == "top" else op["top_k"]
    return int(min(op["experts"], tokens * each))
