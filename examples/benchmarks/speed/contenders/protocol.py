"""What a benchmark's contenders share: each is a process that times itself when it is told to.

On stdout it says in one line of JSON what it is, once its model is loaded, and then answers every
line of stdin with one number:

    prefill TOKENS BUDGET     seconds for a prompt, from an empty cache to the last logits
    decode PAST NEW BUDGET    seconds for NEW calls of one token each, after PAST tokens
    bytes BUDGET              bytes of weights that one decoded token reads
    activations BUDGET        experts run per token and layer, in the last timing; if they aren't
                              counted, what the budget says

BUDGET is a fraction of the full model's expert activations. Tokens are random, the same for all
contenders of one vocabulary. Needs only the standard library and numpy, as contenders may live in
virtual environments of their own, on Linux.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

SEED = 0


class Contender(Protocol):
    """A loaded model with a cache."""

    vocabulary: int

    def set_budget(self, budget: float) -> None:
        """Run on this fraction of the expert activations from now on."""

    def reset(self) -> None:
        """Empty the cache."""

    def forward(self, ids: NDArray[np.int64]) -> None:
        """Append tokens to the cache and compute the logits of the last one."""

    def seconds(self, workload: str, measure: Callable[[], float]) -> float:
        """Return what the contender takes: ``measure()``, or the best of what it can choose."""

    def active_bytes(self) -> float:
        """Return the bytes of weights that a decoded token reads under the budget."""

    def activations(self) -> float:
        """Return the experts run per token and layer."""


def serve(load: Callable[[], Contender], description: str) -> None:
    """Load a contender and obey stdin until it ends; stdout is for the protocol alone."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print what they like
    start = time.perf_counter()
    contender = load()
    hello = {
        "description": description,
        "load_seconds": time.perf_counter() - start,
        **resident_memory(),
    }
    _say(answers, json.dumps(hello))
    for line in sys.stdin:
        _say(answers, repr(answer(contender, line)))


def answer(contender: Contender, command: str) -> float:
    """Return what one line of the protocol asks for."""
    what, *sizes, budget = command.split()
    contender.set_budget(float(budget))
    if what == "bytes":
        return contender.active_bytes()
    if what == "activations":
        return contender.activations()
    past, new = (0, int(sizes[0])) if what == "prefill" else map(int, sizes)
    random = np.random.default_rng(SEED)
    ids = random.integers(0, contender.vocabulary, past + new)
    calls = [ids] if what == "prefill" else np.split(ids[past:], new)

    def measure() -> float:
        contender.reset()
        if past:
            contender.forward(ids[:past])
        start = time.perf_counter()
        for call in calls:
            contender.forward(call)
        return time.perf_counter() - start

    return contender.seconds(command.strip(), measure)


def resident_memory() -> dict[str, int]:
    """Return this process's resident bytes, and those of them that are no pages of files."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    names = {"resident_bytes": "VmRSS", "anonymous_bytes": "RssAnon"}
    return {name: int(sizes[field].split()[0]) * 1024 for name, field in names.items()}


def _say(answers: TextIO, line: str) -> None:
    answers.write(line + "\n")
    answers.flush()
