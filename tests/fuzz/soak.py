"""Use artifacts for an hour, rightly and wrongly, and see that nothing changes and nothing grows.

    OMP_NUM_THREADS=1 python tests/fuzz/soak.py half.onnx dial.onnx --minutes 60

Actions are drawn at random: prompts are continued alone and in batches, in pieces, from forked and
truncated caches, at several prices; texts are scored; artifacts are opened, checked and closed;
and calls are made that must be refused. What a prompt gave the first time it must give each time,
whatever ran between. Memory, open files and threads are compared with those after a tenth of the
time.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alloc_moe.runtime import AllocMoeError, ArtifactSession, open_session, price_of
from alloc_moe.runtime.text.generation import generate

PROMPTS = 12
NEW_TOKENS = 24
TOLERANCE = {False: 1e-3, True: 0.5}
"""Of a logit, in another batch or from a cache of another past: sums are of another order there.

With rounded weights (True) one row and many take other kernels, which round activations or don't.
"""


@dataclass
class Usage:
    """What the process holds: resident MiB, open files, threads."""

    memory: float
    files: int
    threads: int

    @classmethod
    def now(cls) -> Usage:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        return cls(memory, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))


@dataclass
class Subject:
    """An artifact, and what its prompts gave the first time."""

    session: ArtifactSession
    prompts: list[list[int]]
    prices: list[float | None]
    logits: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    tokens: dict[tuple[int, int], list[int]] = field(default_factory=dict)


def subject_of(path: str, draw: random.Random) -> Subject:
    session = open_session(path, ep="cpu", threads=1)
    vocabulary = session.vocabulary or 256
    lengths = [draw.randint(1, 60) for _ in range(PROMPTS)]
    prompts = [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]
    prices: list[float | None] = [None]
    if session.has_dial:
        prices += [price_of(session.plan, budget) for budget in (0.4, 0.8)]
    subject = Subject(session, prompts, prices)
    for at, prompt in enumerate(prompts):
        for price, value in enumerate(prices):
            subject.logits[at, price] = session.run([prompt], price=value).logits[0]
            [tokens] = generate(
                session, [prompt], max_new_tokens=NEW_TOKENS, price=value, eos_ids=()
            )
            subject.tokens[at, price] = tokens
    return subject


class Soak:
    """The actions; each raises AssertionError where something isn't as it was."""

    def __init__(self, paths: list[str], seed: int) -> None:
        self.draw = random.Random(seed)
        self.paths = paths
        self.subjects = [subject_of(path, self.draw) for path in paths]
        self.near = {False: 0.0, True: 0.0}

    def actions(self) -> Iterator[tuple[str, Callable[[Subject], None]]]:
        yield "alone", self.alone
        yield "in a batch", self.batch
        yield "in pieces", self.pieces
        yield "forked and truncated", self.forked
        yield "generated", self.generated
        yield "opened and closed", self.opened
        yield "refused", self.refused

    def alone(self, subject: Subject) -> None:
        at, price = self._case(subject)
        output = subject.session.run([subject.prompts[at]], price=subject.prices[price])
        np.testing.assert_array_equal(output.logits[0], subject.logits[at, price])

    def batch(self, subject: Subject) -> None:
        if subject.session.plan.redistribution == "batch" or subject.session.plan.cap is not None:
            return
        price = self._case(subject)[1]
        rows = self.draw.sample(range(PROMPTS), self.draw.randint(2, 5))
        width = max(len(subject.prompts[row]) for row in rows)
        ids = np.zeros((len(rows), width), np.int64)
        mask = np.zeros_like(ids)
        for at, row in enumerate(rows):
            prompt = subject.prompts[row]
            ids[at, width - len(prompt) :] = prompt
            mask[at, width - len(prompt) :] = 1
        output = subject.session.run(ids, attention_mask=mask, price=subject.prices[price])
        for at, row in enumerate(rows):
            self._near(subject, output.logits[at, -1], subject.logits[row, price][-1])

    def pieces(self, subject: Subject) -> None:
        at, price = self._case(subject)
        prompt, cache, value = subject.prompts[at], None, subject.prices[price]
        while prompt:
            size = self.draw.randint(1, len(prompt))
            output = subject.session.run([prompt[:size]], cache=cache, price=value)
            prompt, cache = prompt[size:], output.cache
        if subject.session.plan.redistribution not in ("batch", "sequence"):
            self._near(subject, output.logits[0, -1], subject.logits[at, price][-1])

    def forked(self, subject: Subject) -> None:
        at, price = self._case(subject)
        prompt, value = subject.prompts[at], subject.prices[price]
        first = subject.session.run([prompt], price=value)
        fork = first.cache.fork()
        junk = self.draw.randint(1, 8)
        subject.session.run([prompt[:1] * junk], cache=fork, price=value)
        fork.truncate(len(prompt))
        token = subject.tokens[at, price][:1]
        one = subject.session.run([token], cache=first.cache, price=value).logits
        two = subject.session.run([token], cache=fork, price=value).logits
        np.testing.assert_array_equal(one, two)

    def generated(self, subject: Subject) -> None:
        at, price = self._case(subject)
        [tokens] = generate(
            subject.session,
            [subject.prompts[at]],
            max_new_tokens=NEW_TOKENS,
            price=subject.prices[price],
            eos_ids=(),
        )
        assert tokens == subject.tokens[at, price], (tokens, subject.tokens[at, price])

    def opened(self, subject: Subject) -> None:
        path = self.paths[self.subjects.index(subject)]
        session = open_session(path, ep="cpu", threads=1)
        session.files.check_data()
        at = self.draw.randrange(PROMPTS)
        logits = session.run([subject.prompts[at]]).logits[0]
        np.testing.assert_array_equal(logits, subject.logits[at, 0])

    def refused(self, subject: Subject) -> None:
        session, prompt = subject.session, subject.prompts[0]
        other = self.subjects[self.subjects.index(subject) - 1].session
        wrong: list[Callable[[], Any]] = [
            lambda: session.run([]),
            lambda: session.run([[]]),
            lambda: session.run([[-1]]),
            lambda: session.run([[10**9]]),
            lambda: session.run([[0.5]]),
            lambda: session.run([prompt], attention_mask=[[2] * len(prompt)]),
            lambda: session.run([prompt], attention_mask=[[1]] * 3),
            lambda: session.run([prompt], price=float("nan")),
            lambda: session.run([prompt], logits_to_keep=0),
            lambda: session.run([prompt, prompt], cache=session.run([prompt]).cache),
            lambda: session.run([[0] * ((session.context_length or 10**5) + 1)]),
            lambda: session.run([prompt]).cache.truncate(len(prompt) + 1),
            lambda: generate(session, [[]], max_new_tokens=1),
            lambda: generate(session, [prompt], max_new_tokens=-1),
            lambda: session.empty_cache(0),
        ]
        if other is not session:
            wrong.append(lambda: session.run([prompt], cache=other.empty_cache(1)))
        call = self.draw.choice(wrong)
        try:
            call()
        except (AllocMoeError, ValueError):
            return
        raise AssertionError(f"not refused: wrong[{wrong.index(call)}]")

    def _case(self, subject: Subject) -> tuple[int, int]:
        return self.draw.randrange(PROMPTS), self.draw.randrange(len(subject.prices))

    def _near(self, subject: Subject, logits: np.ndarray, wanted: np.ndarray) -> None:
        error = float(np.abs(logits - wanted).max())
        rounded = bool(subject.session.plan.quantization)
        self.near[rounded] = max(self.near[rounded], error)
        assert error <= TOLERANCE[rounded], error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    soak = Soak(options.artifacts, options.seed)
    start, end = time.monotonic(), time.monotonic() + 60 * options.minutes
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    early = None
    said = start
    while time.monotonic() < end:
        name, action = soak.draw.choice(list(soak.actions()))
        try:
            action(soak.draw.choice(soak.subjects))
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        counts[name] += 1
        now = time.monotonic()
        if early is None and now > start + 6 * options.minutes:
            early = Usage.now()
        if now > said + 60:
            said = now
            print(f"{now - start:.0f} s: {counts.total()}, {Usage.now()}", file=sys.stderr)
    for name, count in counts.items():
        print(f"{count} {name}")
    print(
        f"{counts.total()} actions, {len(wrong)} wrong; other sums "
        f"{soak.near[False]:.1e} off at most, with rounded weights {soak.near[True]:.1e}"
    )
    print(f"after a tenth {early}, at the end {Usage.now()}")
    print("\n".join(wrong[:20]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
