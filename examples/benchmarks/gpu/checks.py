"""Whether the captured step computes what onnxruntime does: logits, and greedy tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from artifacts import SEED
from numpy.typing import NDArray

from alloc_moe.runtime.execution.session import ArtifactSession

TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1.5e-1, "int8": 2e-2, "int4": 2e-2}
"""The largest difference of logits, by an artifact's type; those in few bits compute in float16."""

_MOST_OFF = 0.01  # of positions: a near tie between experts may be decided either way
PROMPT = 24
"""Tokens of a prompt that is compared, unless said otherwise."""


@dataclass
class Comparison:
    """Differences between two sessions, collected over calls.

    ``errors`` is the largest difference of the logits of each position; ``flips`` are the greedy
    tokens that differ, each as the gap between the two best logits.
    """

    errors: list[float] = field(default_factory=list)
    flips: list[float] = field(default_factory=list)
    is_finite: bool = True

    def add(self, found: NDArray[np.floating], expected: NDArray[np.floating]) -> None:
        """Compare logits [batch, columns, vocabulary], of real tokens only."""
        rows = expected.reshape(-1, expected.shape[-1]).astype(np.float32)
        others = found.reshape(rows.shape).astype(np.float32)
        self.is_finite &= bool(np.isfinite(others).all() and np.isfinite(rows).all())
        self.errors.extend(float(error) for error in np.abs(rows - others).max(axis=-1))
        for row, other in zip(rows, others, strict=True):
            if row.argmax() != other.argmax():
                best = np.partition(row, -2)[-2:]
                self.flips.append(float(best[1] - best[0]))

    def verdict(self, tolerance: float) -> dict[str, Any]:
        """Return what to report; ``ok`` allows for near ties of experts and of tokens."""
        errors = np.asarray(self.errors)
        off = int((~(errors <= tolerance)).sum())
        widest = max(self.flips, default=0.0)
        return {
            "value": float(errors.max()) if self.is_finite else float("nan"),
            "unit": "logits",
            "ok": bool(
                self.is_finite and off <= _MOST_OFF * len(errors) and widest <= 2 * tolerance
            ),
            "note": (
                f"99% within {np.quantile(errors, 0.99):.1e}, {off} of {len(errors)} beyond "
                f"{tolerance:g}; tokens equal {len(errors) - len(self.flips)} of {len(errors)}"
                + (f", widest gap {widest:.1e}" if self.flips else "")
            ),
        }


def left_padded(batch: int, columns: int, vocabulary: int) -> tuple[Any, Any]:
    """Return prompts of several lengths and their mask [batch, columns]; the first has no padding.

    Padding has a token id too, which must not matter.
    """
    random = np.random.default_rng(SEED + batch)
    ids = random.integers(3, vocabulary, (batch, columns))
    lengths = random.integers(1, columns + 1, batch)
    lengths[0] = columns
    return ids, (np.arange(columns) >= columns - lengths[:, None]).astype(np.int64)


def compare(
    found: ArtifactSession,
    expected: ArtifactSession,
    *,
    batch: int,
    steps: int,
    price: float | None = None,
    columns: int = PROMPT,
) -> Comparison:
    """Run prompts and steps through two sessions and compare all logits at their ends.

    Both get the tokens that are best by the second, so that they stay together after a near tie.
    """
    comparison = Comparison()
    ids, mask = left_padded(batch, columns, expected.vocabulary or 256)
    sessions = (found, expected)
    caches = [each.empty_cache(batch, capacity=columns + steps) for each in sessions]
    for _ in range(1 + steps):
        options: Any = {"attention_mask": mask, "price": price, "logits_to_keep": 1}
        mine, theirs = (
            session.run(ids, cache=cache, **options).logits
            for session, cache in zip(sessions, caches, strict=True)
        )
        comparison.add(mine[:, -1:], theirs[:, -1:])
        ids = theirs[:, -1:].argmax(axis=-1)
        mask = np.concatenate([mask, np.ones((batch, 1), np.int64)], axis=1)
    return comparison


def greedy(
    session: ArtifactSession, count: int, *, batch: int = 1, price: float | None = None
) -> Any:
    """Return the greedy tokens [batch, count] after left-padded prompts."""
    ids, mask = left_padded(batch, PROMPT, session.vocabulary or 256)
    cache = session.empty_cache(batch, capacity=PROMPT + count)
    found = []
    for _ in range(count):
        options: Any = {"attention_mask": mask, "price": price, "logits_to_keep": 1}
        ids = session.run(ids, cache=cache, **options).logits[:, -1:].argmax(axis=-1)
        found.append(ids)
        mask = np.concatenate([mask, np.ones((batch, 1), np.int64)], axis=1)
    return np.concatenate(found, axis=1)


@contextlib.contextmanager
def launched_one_by_one(session: ArtifactSession) -> Iterator[None]:
    """Have a session's decode steps launch their kernels, and not replay them as a graph."""
    stepper = None if session._kernels is None else session._kernels.stepper
    if stepper is None:  # no GPU: onnxruntime computes both
        yield
        return
    stepper.replays = False
    try:
        yield
    finally:
        stepper.replays = True


def same_tokens(found: Any, expected: Any) -> tuple[int, int]:
    """Return how many tokens are equal until each row's first difference, and of how many."""
    same = np.cumprod(found == expected, axis=1)
    return int(same.sum()), int(found.size)
