"""Artifacts as they are timed: opened, priced, decoding and reading prompts."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.execution.calls import Session
from alloc_moe.runtime.execution.session import open_session

SEED = 0
FRACTIONS = {"full": 1.0, "half": 0.5, "quarter": 0.25}
_WARM = 8  # steps before those that count
_RUNS = 7  # of a prompt
_PIECE = 16  # tokens: as many as a step may have


@dataclass(frozen=True)
class Sizes:
    """How long everything is: smaller on the CPU, where only the script itself is tried out."""

    past: int = 128
    steps: int = 60
    prompt: int = 2048
    batch: int = 8
    tokens: int = 1000


def open_artifact(path: Path, device: str, *, capture: bool = True, count: bool = False) -> Session:
    """Return a session; on the GPU, with or without our captured decode step."""
    ep: Any = device
    options: dict[str, Any] = {"capture": capture} if device == "cuda" else {}
    return open_session(path, ep=ep, count_activations=count, **options)


def marked(result: dict[str, Any], session: Session) -> dict[str, Any]:
    """Return a result that is wrong if the session has no captured step, on the GPU."""
    if session.device == "cuda" and not getattr(session, "captures", None):
        note = f"NOT CAPTURED, see the log; {result.get('note', '')}"
        return {**result, "ok": False, "note": note}
    return result


def release() -> None:
    """Free the memory of sessions that nothing refers to any more."""
    gc.collect()


def random_tokens(session: Session, batch: int, columns: int, seed: int = SEED) -> Any:
    """Return token ids [batch, columns], the same every time."""
    random = np.random.default_rng(seed)
    return random.integers(3, session.vocabulary or 256, (batch, columns))


def price_for(
    counting: Session, fraction: float, ids: NDArray[np.int64], *, rounds: int = 10
) -> float:
    """Return the price at which a fraction of the experts runs in the mean, on these tokens.

    With random weights no calibration text is better than any other. The tokens go in by pieces, so
    that whatever is kept, kernels see few sizes: onnxruntime tries out its kernels for each.
    """
    if fraction >= 1:
        return 0.0
    wanted = fraction * sum(layer.k_original for layer in counting.plan.layers) * ids.size
    low, high = 0.0, 1.0
    for _ in range(rounds):
        middle = (low + high) / 2
        cache = counting.empty_cache(1, capacity=ids.shape[1])
        found = 0
        for piece in np.split(ids, range(_PIECE, ids.shape[1], _PIECE), axis=1):
            output = counting.run(piece, cache=cache, price=middle, logits_to_keep=1)
            found += sum(output.activations or ())
        low, high = (low, middle) if found <= wanted else (middle, high)
    return high


def decode_seconds(
    session: Session, sizes: Sizes, *, batch: int = 1, price: float | None = None
) -> tuple[float, Any]:
    """Return the median seconds of a step after a prompt, and the last logits.

    A step is a call with the next token of every sequence, from host memory to the logits in host
    memory. The tokens are given, so that all run the same.
    """
    seconds, logits = [], None
    for second, output in steps(session, sizes, batch=batch, price=price):
        seconds.append(second)
        logits = output.logits
    return statistics.median(seconds[_WARM:]), logits


def steps(session: Session, sizes: Sizes, *, batch: int, price: float | None) -> Any:
    """Yield of every step its seconds and its output, warm-up included."""
    columns = sizes.past + _WARM + sizes.steps
    ids = random_tokens(session, batch, columns)
    cache = session.empty_cache(batch, capacity=columns)
    session.run(ids[:, : sizes.past], cache=cache, logits_to_keep=1)  # whatever the budget
    for column in range(sizes.past, columns):
        token = np.ascontiguousarray(ids[:, column : column + 1])
        start = time.perf_counter()
        output = session.run(token, cache=cache, price=price, logits_to_keep=1)
        yield time.perf_counter() - start, output


def decode_kept(counting: Session, sizes: Sizes, *, batch: int, price: float | None) -> list[float]:
    """Return the experts per token that each layer executes in the steps of `decode_seconds`."""
    rows = [
        output.activations
        for _, output in steps(counting, sizes, batch=batch, price=price)
        if output.activations is not None
    ]
    return [float(mean) / batch for mean in np.mean(rows[_WARM:], axis=0)]


def prefill_seconds(
    session: Session, sizes: Sizes, *, price: float | None = None
) -> tuple[float, float, Any]:
    """Return the median seconds of one prompt, those of prompts never seen, and the logits.

    A call takes a whole prompt with an empty cache and returns the logits of its last position.
    """
    same = random_tokens(session, 1, sizes.prompt)
    seconds = [_prompt(session, same, price)[0] for _ in range(2 + _RUNS)]
    others = [
        _prompt(session, random_tokens(session, 1, sizes.prompt, seed), price) for seed in (1, 2)
    ]
    new = statistics.median(second for second, _ in others)
    return statistics.median(seconds[2:]), new, others[-1][1]


def _prompt(session: Session, ids: Any, price: float | None) -> tuple[float, Any]:
    cache = session.empty_cache(1, capacity=ids.shape[1])
    start = time.perf_counter()
    output = session.run(ids, cache=cache, price=price, logits_to_keep=1)
    return time.perf_counter() - start, output.logits


def prompt_kept(counting: Session, sizes: Sizes, *, price: float | None) -> list[float]:
    """Return the experts per token that each layer executes in `prefill_seconds`."""
    ids = random_tokens(counting, 1, sizes.prompt)
    output = counting.run(ids, price=price, logits_to_keep=1)
    return [count / sizes.prompt for count in output.activations or ()]


def decode_bytes(
    description: dict[str, Any], plan: str, kept: Sequence[float], *, batch: int = 1
) -> float:
    """Return the bytes of weights that a step must read once.

    Of several sequences the experts are drawn as if independently: those that two share count once.
    """
    entry, layers = description["plans"][plan], description["layers"]
    total = sum(layer["experts"] for layer in layers)
    distinct = [
        layer["experts"] * (1 - (1 - min(k / layer["experts"], 1.0)) ** batch)
        for layer, k in zip(layers, kept, strict=True)
    ]
    return float(entry["other_bytes"] + entry["expert_bytes"] * sum(distinct) / total)
