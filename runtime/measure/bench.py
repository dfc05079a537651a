"""How fast artifacts are on this machine, prefill and decode, measured in turns."""

from __future__ import annotations

import functools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.cache import Cache
from alloc_moe.runtime.execution.calls import Session
from alloc_moe.runtime.execution.finite import check_finite
from alloc_moe.runtime.text.hold import HeldBudget, prefill, run_held

_UNKNOWN_VOCABULARY = 256  # ids that any model has


@dataclass(frozen=True)
class Workload:
    """What is timed, for every artifact ``runs`` times after one run to warm up.

    Prefill: one call with ``prompt_tokens`` tokens and an empty cache. Decode: ``new_tokens`` calls
    with one token each, the first with ``past`` tokens in the cache. As in generation, logits are
    those of the last token only. The tokens are random, drawn with ``seed``, the same for all
    artifacts; the batch is one.
    """

    prompt_tokens: int = 128
    past: int = 128
    new_tokens: int = 32
    runs: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Speed:
    """Tokens per second in each run."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        """The run in the middle."""
        return statistics.median(self.runs)

    def ratio(self, first: Speed) -> float:
        """Return how many times faster than ``first``: the median over runs made in turns."""
        return statistics.median(
            mine / other for mine, other in zip(self.runs, first.runs, strict=True)
        )


@dataclass(frozen=True)
class Measurement:
    """One artifact's speeds."""

    prefill: Speed
    decode: Speed


def benchmark(
    sessions: Sequence[Session],
    workload: Workload,
    *,
    prices: Sequence[float | HeldBudget | None] | None = None,
    on_run: Callable[[], None] | None = None,
) -> list[Measurement]:
    """Return the speeds of artifacts, measured in turns: A B, A B, ...

    Turns spread what else happens on the machine evenly. Open the sessions with
    ``stop_spinning=True``, else the idle threads of one slow down the other.

    Args:
        sessions: What to measure; one may stand there several times, at different prices.
        workload: What each does.
        prices: The price of an activation for each, for artifacts with a dial, or the budget that
            each run of it holds; None is their own price.
        on_run: Called after every run.

    Raises:
        GenerationError: The workload doesn't fit the context of a model, or is none.
    """
    _check(sessions, workload)
    vocabulary = min(session.vocabulary or _UNKNOWN_VOCABULARY for session in sessions)
    random = np.random.default_rng(workload.seed)
    prompt = random.integers(0, vocabulary, (1, workload.prompt_tokens))
    past = random.integers(0, vocabulary, (1, workload.past))
    new = random.integers(0, vocabulary, (1, workload.new_tokens))
    priced = list(zip(sessions, prices or [None] * len(sessions), strict=True))
    caches = [_filled(run, workload, past, price) for run, price in priced]
    seconds: list[list[tuple[float, float]]] = [[] for _ in sessions]
    for _ in range(1 + workload.runs):
        for timings, (session, price), cache in zip(seconds, priced, caches, strict=True):
            prefill = _prefill(session, prompt, price)
            timings.append((prefill, _decode(session, new, cache.fork(), price)))
            if on_run is not None:
                on_run()
    return [
        Measurement(
            prefill=Speed(tuple(workload.prompt_tokens / prefill for prefill, _ in timings[1:])),
            decode=Speed(tuple(workload.new_tokens / decode for _, decode in timings[1:])),
        )
        for timings in seconds
    ]


def machine() -> str:
    """Return what this machine's processor is called, and how many of it there are."""
    return f"{_processor()}, {os.cpu_count()} logical CPUs, {platform.system()}"


def _filled(
    session: Session,
    workload: Workload,
    past: NDArray[np.int64],
    price: float | HeldBudget | None,
) -> Cache:
    """Return a cache that holds the past and has room for the new tokens."""
    cache = session.empty_cache(1, capacity=workload.past + workload.new_tokens)
    if workload.past:
        given = price.begin().price if isinstance(price, HeldBudget) else price
        session.run(past, cache=cache, price=given, logits_to_keep=1)
    return cache


def _prefill(
    session: Session, prompt: NDArray[np.int64], price: float | HeldBudget | None
) -> float:
    start = time.perf_counter()
    if isinstance(price, HeldBudget):
        output = prefill(session, prompt[0].tolist(), price.begin(), capacity=prompt.shape[1])
    else:
        output = session.run(prompt, price=price, logits_to_keep=1)
    seconds = time.perf_counter() - start
    check_finite(output.logits.max(), f"{session.files.graph} computed logits")
    return seconds


def _decode(
    session: Session,
    new: NDArray[np.int64],
    cache: Cache,
    price: float | HeldBudget | None,
) -> float:
    start = time.perf_counter()
    if isinstance(price, HeldBudget):
        run = functools.partial(run_held, session, price.begin())
    else:
        run = functools.partial(session.run, price=price)
    for column in range(new.shape[1]):
        run(new[:, column : column + 1], cache=cache, logits_to_keep=1)
    return time.perf_counter() - start


def _check(sessions: Sequence[Session], workload: Workload) -> None:
    least = {"prompt_tokens": 1, "past": 0, "new_tokens": 1, "runs": 1, "seed": 0}
    for name, minimum in least.items():
        if (value := getattr(workload, name)) < minimum:
            raise GenerationError(f"{name} is {value}. Give {minimum} or more.")
    longest = max(workload.prompt_tokens, workload.past + workload.new_tokens)
    for session in sessions:
        limit = session.context_length
        if limit is not None and longest > limit:
            raise GenerationError(
                f"The context of {session.files.graph} holds {limit} tokens, the benchmark needs "
                f"{longest}. Ask for fewer prompt tokens, or less past and fewer new ones."
            )


def _processor() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        return answer.stdout.strip() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
