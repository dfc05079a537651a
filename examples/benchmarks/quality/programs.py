"""Compares programs of torch with the ONNX artifact of the same plan: logits, tokens, time.

    for end in onnx pt pt2; do
      alloc-compile examples/tiny-moe --budget 0.5 --profile tiny.profile.json -o tiny.$end
    done
    python examples/benchmarks/quality/programs.py tiny.onnx tiny.pt tiny.pt2

Logits are those of a left-padded batch of three prompts, prefilled and then fed the same tokens one
at a time; tokens are the 64 that each chooses by itself. Times are seconds of the processor, one
thread, medians of turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from alloc_moe.runtime import open_session
from alloc_moe.runtime.text.generation import generate

LENGTHS = (29, 17, 40)
NEW = 64
PREFILL = 96
STEPS = 16


def prompts(vocabulary: int) -> list[list[int]]:
    """Return random prompts of several lengths."""
    draw = np.random.default_rng(0)
    return [draw.integers(2, vocabulary, length).tolist() for length in LENGTHS]


def forced_logits(session: Any, given: list[list[int]], tokens: np.ndarray) -> np.ndarray:
    """Return the logits [tokens, vocabulary] of prompts and of what follows them, pads left out."""
    width = max(map(len, given))
    ids = np.array([[0] * (width - len(prompt)) + prompt for prompt in given])
    mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in given])
    cache, found = None, []
    for new in (ids, *np.split(tokens, tokens.shape[1], axis=1)):
        output = session.run(new, attention_mask=mask, cache=cache)
        cache = output.cache
        found.append(output.logits[mask[:, -new.shape[1] :] > 0])
        mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
    return np.concatenate(found)


def times(sessions: list[Any], turns: int) -> list[tuple[float, float]]:
    """Return the median seconds of each for a prompt, and for a token after it."""
    ids = np.random.default_rng(1).integers(2, sessions[0].vocabulary, (1, PREFILL + STEPS))
    took: list[list[tuple[float, float]]] = [[] for _ in sessions]
    for _ in range(turns + 1):
        for session, found in zip(sessions, took, strict=True):
            began = time.process_time()
            cache = session.run(ids[:, :PREFILL], logits_to_keep=1).cache
            prompt = time.process_time()
            for column in range(PREFILL, PREFILL + STEPS):
                step = ids[:, column : column + 1]
                cache = session.run(step, cache=cache, logits_to_keep=1).cache
            found.append((prompt - began, (time.process_time() - prompt) / STEPS))
    # The first turn is slow.
    return [tuple(map(statistics.median, zip(*found[1:], strict=True))) for found in took]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", help="the ONNX artifact first")
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    sessions = [open_session(path, ep="cpu", threads=1) for path in arguments.artifacts]
    own = sessions[0]
    assert own.vocabulary is not None
    given = prompts(own.vocabulary)
    tokens = np.array(generate(own, given, max_new_tokens=NEW, eos_ids=()))
    expected = forced_logits(own, given, tokens)
    measured = times(sessions, arguments.turns)
    for path, session, took in zip(arguments.artifacts, sessions, measured, strict=True):
        assert session.plan.layers == own.plan.layers, f"{path} has another plan"
        error = float(np.abs(forced_logits(session, given, tokens) - expected).max())
        chosen = np.array(generate(session, given, max_new_tokens=NEW, eos_ids=()))
        ratios = [own_took / other for own_took, other in zip(measured[0], took, strict=True)]
        print(
            f"{path}: largest logit difference {error:.1e}, {(chosen != tokens).sum()} of "
            f"{tokens.size} tokens differ, {1000 * took[0]:.1f} ms per prompt of {PREFILL} "
            f"({ratios[0]:.2f}x as fast), {1000 * took[1]:.2f} ms per token ({ratios[1]:.2f}x)"
        )


if __name__ == "__main__":
    main()
