"""Profiles that several processes measure together."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture
def run(warm: Any) -> Callable[..., list[Any]]:
    """Return what runs alloc-profile in processes that work together, as torchrun starts them."""

    def start(size: int, *arguments: str, die: int | None = None) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        common |= {} if die is None else {"DIE": str(die)}
        return [
            warm.start(PROCESS, *arguments, environment={**common, "RANK": str(rank)})
            for rank in range(size)
        ]

    return start


def finish(processes: list[Any]) -> list[tuple[int, str, str]]:
    """Return exit code, stdout and stderr of each."""
    return [process.finish() for process in processes]


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
    checkpoint: Callable[[str], Path],
    run: Callable[..., list[Any]],
    tmp_path: Path,
    options: list[str],
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
    checkpoint: Callable[[str], Path],
    run: Callable[..., list[Any]],
    tmp_path: Path,
    offload: str,
    die: int,
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
