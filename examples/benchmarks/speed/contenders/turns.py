"""Contenders as processes, timed in turns; see protocol.py for what they answer."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import click
from bandwidth import Reader

from contenders.report import Results

_SCRIPT = Path(__file__).parents[1] / "contender.py"


class Process:
    """A contender's process. It is stopped but while it is asked: its threads may spin."""

    def __init__(self, name: str, python: str, kind: str, *options: str) -> None:
        self.name = name
        self.counts = "--count" in options
        self._process = subprocess.Popen(
            [python, str(_SCRIPT), kind, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.hello: dict[str, Any] = json.loads(self._answer())

    def ask(self, command: str) -> float:
        """Return the answer to a line of the protocol."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(command + "\n")
        return float(self._answer())

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, stopped or not."""
        self._process.kill()
        self._process.communicate()

    def loaded(self) -> str:
        """Return a sentence on what was loaded."""
        resident, own = (self.hello[f"{kind}_bytes"] / 1e9 for kind in ("resident", "anonymous"))
        return (
            f"{self.name}: {self.hello['description']}; loaded in "
            f"{self.hello['load_seconds']:.1f} s, resident {resident:.2f} GB, "
            f"{own:.2f} GB without pages of files"
        )

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise click.ClickException(f"The process of {self.name} ended; see its messages.")
        self._process.send_signal(signal.SIGSTOP)
        return line


Contestant = tuple[Process, float]  # at a budget


def run_rounds(
    results: Results,
    contestants: Sequence[Contestant],
    workloads: Sequence[str],
    *,
    rounds: int,
    reader: Reader,
) -> None:
    """Add the speeds of contenders at budgets, in turns, and the bandwidth beside them."""
    for number in range(1 + rounds):  # the first warms up
        bandwidth = max(reader.measure(3).values())
        for workload in workloads:
            speeds = results.speeds.setdefault(workload, {})
            tokens = int(workload.split()[-1])
            for process, budget in contestants:
                seconds = process.ask(f"{workload} {budget}")
                if number:
                    speeds.setdefault((process.name, budget), []).append(tokens / seconds)
        if number:
            results.bandwidth.append(bandwidth)
        click.echo(f"Round {number} of {rounds}", err=True)


def count(results: Results, contestants: Sequence[Contestant], workloads: Sequence[str]) -> None:
    """Add how many experts contenders run per token, and the bytes that a decoded one reads."""
    for process, budget in contestants:
        for workload in workloads:
            if process.counts:
                process.ask(f"{workload} {budget}")
            found = process.ask(f"activations {budget}")
            results.activations.setdefault(workload, {})[process.name, budget] = found
            if workload.startswith("decode"):
                results.active_bytes[process.name, budget] = process.ask(f"bytes {budget}")
