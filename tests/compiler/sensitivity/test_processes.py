"""Profiles that several processes measure together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alloc_moe.compiler.commands.alloc_profile import profile_command
from alloc_moe.compiler.errors import CalibrationError
from alloc_moe.compiler.sensitivity import job
from alloc_moe.compiler.workspace.processes import Processes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs gloo over TCP")

# One of the processes; with DIE the second is killed after so many calls of DIES_AT.
PROCESS = """
import functools, os, signal, sys
import torch
from alloc_moe.compiler.sensitivity import job
from alloc_moe.compiler.sensitivity import measuring as sensitivity
from alloc_moe.compiler.sensitivity import layerwise as sensitivity_stream
from alloc_moe.compiler.commands.alloc_profile import profile_command

torch.set_num_threads(1)
job._TOKENS_PER_BATCH, sensitivity._SECONDS_PER_SAVE = 64, 0.0
calls = 0

def counted(function, *args, **kwargs):
    global calls
    calls += 1
    if calls > int(os.environ["DIE"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)

if "DIE" in os.environ and os.environ["RANK"] == "1":
    name = "reduced_rows"
    for module in (sensitivity, sensitivity_stream):
        setattr(module, name, functools.partial(counted, getattr(module, name)))
profile_command(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide the text as the other processes do."""
    monkeypatch.setattr(job, "_TOKENS_PER_BATCH", 64)


def run(size: int, *arguments: str, die: int | None = None) -> list[subprocess.Popen[str]]:
    """Run alloc-profile in processes that work together, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size):
        settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        settings |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
        settings |= {} if die is None else {"DIE": str(die)}
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, *arguments],
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
    return started


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Return exit code, stdout and stderr of each."""
    said = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *each) for process, each in zip(processes, said, strict=True)]


def compare(folder: Path, actual: str, expected: str) -> None:
    """Compare two profiles, which sums in another order may change in their last digits."""
    found, wanted = (json.loads((folder / name).read_text()) for name in (actual, expected))
    for row, wanted_row in zip(found["costs"], wanted["costs"], strict=True):
        assert row == pytest.approx(wanted_row, rel=1e-6)
    for row, wanted_row in zip(found["expert_sizes"], wanted["expert_sizes"], strict=True):
        assert row == (wanted_row if row is None else pytest.approx(wanted_row, rel=1e-6))
    assert found["baseline_loss"] == pytest.approx(wanted["baseline_loss"], rel=1e-6)
    same = set(wanted) - {"costs", "expert_sizes", "baseline_loss", "seconds"}
    assert {name: found[name] for name in same} == {name: wanted[name] for name in same}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--offload", "always"],
        ["--sensitivity", "output", "--redistribute", "threshold", "--correct", "affine"],
        # More windows: each process gets whole batches, as rounding depends on their shape.
        ["--sensitivity", "kl", "--redistribute", "none", "--correct", "none", "--tokens", "2048"],
    ],
    ids=["offloaded", "all in place", "kl"],
)
def test_two_processes_measure_what_one_does(
    checkpoint: Callable[[str], Path], tmp_path: Path, options: list[str]
) -> None:
    arguments = [str(checkpoint("olmoe")), "--tokens", "640", *options]
    both = run(2, *arguments, "-o", str(tmp_path / "two.json"))
    profile_command([*arguments, "-o", str(tmp_path / "one.json")], standalone_mode=False)
    first, second = finish(both)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert first[1].startswith("Wrote ")
    assert second[1] == ""
    assert "Loading" not in second[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]
    compare(tmp_path, "two.json", "one.json")


@pytest.mark.slow
@pytest.mark.parametrize(("offload", "die"), [("never", 2), ("always", 4)])
def test_a_process_that_dies_fails_the_run_which_then_goes_on_from_what_was_saved(
    checkpoint: Callable[[str], Path], tmp_path: Path, offload: str, die: int
) -> None:
    arguments = [str(checkpoint("olmoe")), "--tokens", "640", "--offload", offload]
    together = run(2, *arguments, "-o", str(tmp_path / "two.json"), die=die)
    (code, _, stderr), _ = finish(together)
    assert code == 1
    assert "Error: Process 0 of 2 lost the others: one of them ended early (" in stderr
    assert "the same command goes on from what was saved." in stderr
    assert "Traceback" not in stderr
    saved = json.loads((tmp_path / "two.json").read_text())
    if offload == "never":
        assert saved["partial"]["windows"] == 4
    else:
        progress = json.loads((tmp_path / ".two.json.states" / "progress.json").read_text())
        assert (progress["stage"], progress["layer"]) == ("backward", 2)
    again = run(2, *arguments, "-o", str(tmp_path / "two.json"))
    profile_command([*arguments, "-o", str(tmp_path / "one.json")], standalone_mode=False)
    assert [code for code, *_ in finish(again)] == [0, 0]
    compare(tmp_path, "two.json", "one.json")


def test_more_processes_than_windows_are_refused() -> None:
    with pytest.raises(
        CalibrationError, match=r"has 3 windows for 4 processes\. Start 3 processes at most"
    ):
        Processes(1, 4).share([1, 2, 3])
    assert Processes(1, 2).share([1, 2, 3]) == [2]


def test_a_process_by_itself_has_everything() -> None:
    alone = Processes()
    assert alone.writes
    assert alone.share([1, 2]) == [1, 2]
    assert alone.broadcast("all") == "all"
