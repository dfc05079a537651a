"""What is measured, part by part; run.py runs each part in a process of its own.

A process says on stdout, a line of JSON each, which measurement begins and what it gave. Those that
it is told to skip it skips, so that after a crash the rest goes on in a new process.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from artifacts import Sizes
from large import large_model
from memory import copy_speed
from peer import Peer
from small_cases import small_model

Result = dict[str, Any]

VARIANTS = {"groups": "-DGROUPS_IN_ATTENTION"}
"""Kernels that are tried out: what NVRTC is told, by the end of a part's name."""


@dataclass(frozen=True)
class Measurement:
    """A name, ``model/kind/budget/path``, and what gives a result."""

    name: str
    measure: Callable[[], Result]

    @property
    def kind(self) -> str:
        """What it is a measurement of: decode, batch, prefill, logits, tokens, copy."""
        return self.name.split("/")[1]


def measurements(
    part: str, graphs: Path, work: Path, device: str, sizes: Sizes
) -> Iterator[Measurement]:
    """Yield a part's measurements in the order in which they share what is loaded."""
    if part == "memory":
        yield Measurement("memory/copy/-/-", lambda: _copy(device))
    elif part == "small":
        for path in sorted(graphs.glob("small-*.json")):
            description = json.loads(path.read_text("utf-8"))
            for name, measure in small_model(description, graphs, work, device):
                yield Measurement(name, measure)
    elif part.startswith("transformers"):
        model = part.partition("-")[2] or "olmoe"
        yield from _peer(json.loads((graphs / f"{model}.json").read_text("utf-8")), device, sizes)
    else:
        model, _, variant = part.partition("+")
        description = json.loads((graphs / f"{model}.json").read_text("utf-8"))
        if variant:
            os.environ["ALLOC_MOE_KERNEL_FLAGS"] = VARIANTS[variant]
        for name, measure in large_model(description, graphs, work, device, sizes):
            each = Measurement(name.replace(model, part, 1), measure)
            if not variant or (each.kind in ("prefill", "logits") and name.endswith("captured")):
                yield each


def _copy(device: str) -> Result:
    speed, way = copy_speed(device)
    return {"value": speed / 1e9, "unit": "GB/s", "note": f"read and written, by {way}"}


def _peer(description: dict[str, Any], device: str, sizes: Sizes) -> Iterator[Measurement]:
    loaded: list[Peer] = []

    def peer(fraction: float) -> Peer:
        if not loaded:
            loaded.append(Peer(description, device))
        loaded[0].set_fraction(fraction)
        return loaded[0]

    def prefill(fraction: float) -> Result:
        return {"value": 1e3 * peer(fraction).prefill_seconds(sizes), "unit": "ms"}

    def decode(fraction: float) -> Result:
        compiled = device == "cuda"
        seconds = peer(fraction).decode_seconds(sizes, compiled=compiled)
        note = "batched_mm, reduce-overhead, static cache, greedy token back"
        return {"value": 1e3 * seconds, "unit": "ms", "note": note}

    name = description["name"]
    for budget, fraction in (("full", 1.0), ("half", 0.5)):
        path = "transformers"
        yield Measurement(f"{name}/prefill/{budget}/{path}", functools.partial(prefill, fraction))
    for budget, fraction in (("full", 1.0), ("half", 0.5)):
        path = "transformers, compiled"
        yield Measurement(f"{name}/decode/{budget}/{path}", functools.partial(decode, fraction))


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--graphs", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", default="{}")
    parser.add_argument("--kinds", default="")
    parser.add_argument("--skip", default="[]")
    given = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print what they like
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("alloc_moe").setLevel(logging.INFO)  # it says why it captures nothing
    skipped, kinds = set(json.loads(given.skip)), set(filter(None, given.kinds.split(",")))
    sizes = Sizes(**json.loads(given.sizes))
    if given.part == "small":  # not timed, of many sizes, for each of which kernels are tried out
        os.environ.setdefault("ORT_FORCE_DETERMINISTIC_MOE", "1")
        os.environ.setdefault("ORT_QMOE_CPU_QNBIT_GEMM", "fp32")  # the CPU is to round nothing
    for each in measurements(given.part, given.graphs, given.work, given.device, sizes):
        if each.name in skipped or (kinds and each.kind not in kinds):
            continue
        _say(answers, {"begin": each.name})
        start = time.perf_counter()
        try:
            result = each.measure()
        except Exception as error:  # whatever it is, the rest goes on
            message = f"{type(error).__name__}: {error}"
            _say(answers, {"name": each.name, "error": message})
            if "cuda" in message.lower():  # what CUDA fails at once, it may fail at for ever
                sys.exit(1)
        else:
            took = round(time.perf_counter() - start, 1)
            _say(answers, {"name": each.name, "took": took, **result})


def _say(answers: TextIO, line: dict[str, Any]) -> None:
    answers.write(json.dumps(line) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
