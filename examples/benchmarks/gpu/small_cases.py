"""Small models: the captured step and onnxruntime's CUDA against the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from artifacts import marked, open_artifact, price_for, random_tokens
from checks import TOLERANCES, Comparison, compare
from fill import fill

_BATCHES = (1, 4, 16)
_STEPS = 12
_CUDA_ONLY = ("bfloat16",)  # onnxruntime's CPU has no such kernels: CUDA is the reference
_OURS_ONLY = ("float32",)  # onnxruntime's CUDA misreads such a past, so calls with one are refused


def small_model(
    description: dict[str, Any], graphs: Path, work: Path, device: str
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield name and function of a model's checks, with and without our captured step."""
    name = description["name"]
    for plan in description["plans"]:
        for path, capture in (("captured", True), ("onnxruntime", False)):
            if not capture and description["dtype"] in (*_CUDA_ONLY, *_OURS_ONLY):
                continue
            check = functools.partial(
                _check, description, graphs, work, device, plan=plan, capture=capture
            )
            yield f"{name}/logits/{plan}/{path}", check


def _check(
    description: dict[str, Any],
    graphs: Path,
    work: Path,
    device: str,
    *,
    plan: str,
    capture: bool,
) -> dict[str, Any]:
    """Compare at full budget and about half, alone and in batches of left-padded prompts."""
    path = fill(description, graphs, work / description["name"])[plan]
    reference = device if description["dtype"] in _CUDA_ONLY else "cpu"
    expected = open_artifact(path, reference, capture=False)
    found = open_artifact(path, device, capture=capture)
    prices: list[float | None] = [None]
    if expected.has_dial:
        counting = open_artifact(path, reference, capture=False, count=True)
        prices = [0.0, price_for(counting, 0.5, random_tokens(counting, 1, 64))]
    comparison = Comparison()
    for price in prices:
        for batch in _BATCHES:
            each = compare(found, expected, batch=batch, steps=_STEPS, price=price)
            comparison.errors += each.errors
            comparison.flips += each.flips
            comparison.is_finite &= each.is_finite
    result = comparison.verdict(TOLERANCES[description["dtype"]])
    return marked(result, found) if capture else result
