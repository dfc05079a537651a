"""Asks a server a thousand times, by sixteen clients at once, and compares every answer.

    pip install '.[serve]' openai psutil
    alloc-compile examples/tiny-moe --budget 0.5 -o bundle/
    python examples/serving/load.py bundle/

It starts alloc-serve itself, on a free port. Each answer must be the one that `generate` gives to
that request alone. Says also how much sooner sixteen clients are served than one, and how the
server's memory grows.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from openai import OpenAI

from alloc_moe.runtime import Sampling, load

TEXT = Path(__file__).parents[1] / "tiny-moe" / "heldout.txt"
BUDGETS = (None, None, "0.4", "1.0")
SETTINGS = ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.0})
SERVE = "from alloc_moe.runtime.commands.alloc_serve import serve_command; serve_command()"


def questions(
    count: int, *, most_characters: int = 300, most_new: int = 40
) -> list[dict[str, Any]]:
    """Return requests of many lengths and settings."""
    draw, text = random.Random(0), TEXT.read_text("utf-8")
    starts = [draw.randrange(len(text) - most_characters) for _ in range(count)]
    return [
        {
            "prompt": text[start : start + draw.randint(4, most_characters)],
            "max_tokens": draw.randint(4, most_new),
            "seed": start,
            "budget": draw.choice(BUDGETS),
            **draw.choice(SETTINGS),
        }
        for start in starts
    ]


def expected(artifact: str, asked: Sequence[dict[str, Any]]) -> list[str]:
    """Return what `generate` answers to each request alone."""
    model = load(artifact, ep="cpu", threads=1)
    answers = []
    for question in asked:
        drawing = {name: question[name] for name in ("temperature", "top_p") if name in question}
        [completion] = model.generate(
            [question["prompt"]],
            max_new_tokens=question["max_tokens"],
            sampling=Sampling(seed=question["seed"], **drawing),
            budget=question["budget"],
        )
        answers.append(completion.text)
    return answers


@contextmanager
def server(artifact: str, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run alloc-serve while the block does; yield its address and its process."""
    command = [sys.executable, "-c", SERVE, artifact, "--port", "0", "--json", "--name", "moe"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0, process.returncode


def answers(
    url: str, asked: Sequence[dict[str, Any]], clients: int
) -> tuple[list[Any], list[float], float]:
    """Return the answers to requests by so many clients, their seconds, and those of all."""

    def answer(question: dict[str, Any]) -> tuple[Any, float]:
        own = {"budget": question["budget"]}
        known = {name: value for name, value in question.items() if name not in own}
        began = time.perf_counter()
        reply = client.completions.create(model="moe", extra_body=own, **known)
        return reply, time.perf_counter() - began

    began = time.perf_counter()
    with (
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(clients) as pool,
    ):
        found = list(pool.map(answer, asked))
    return [reply for reply, _ in found], [s for _, s in found], time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    arguments = parser.parse_args()
    asked = questions(arguments.requests)
    right = expected(arguments.artifact, asked)
    with server(arguments.artifact, "--threads", "1") as (url, process):
        replies, _, seconds = answers(url, asked[: max(1, len(asked) // 10)], 1)
        one = sum(reply.usage.completion_tokens for reply in replies) / seconds
        took: list[float] = []
        memory, wrong, tokens, seconds = [], 0, 0, 0.0
        for part in range(4):  # to see the memory in between
            share = slice(part * len(asked) // 4, (part + 1) * len(asked) // 4)
            replies, each, all_seconds = answers(url, asked[share], arguments.clients)
            texts = [reply.choices[0].text for reply in replies]
            wrong += sum(a != b for a, b in zip(texts, right[share], strict=True))
            tokens += sum(reply.usage.completion_tokens for reply in replies)
            seconds, took = seconds + all_seconds, [*took, *each]
            memory.append(round(process.memory_info().rss / 2**20))
    print(f"{len(took)} requests by {arguments.clients} clients, {wrong} not as `generate` alone")
    print(f"{tokens / seconds:.0f} tokens per second; one client alone: {one:.0f}")
    middle, slow = statistics.median(took), statistics.quantiles(took, n=20)[-1]
    print(f"Seconds per request: {middle:.2f} in the middle, {slow:.2f} at the 95th percentile")
    print(f"Resident MiB of the server after each quarter: {memory}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
