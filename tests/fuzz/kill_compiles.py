"""Kill compiles at random moments, and see what is left: an artifact, old or new, each time.

    OMP_NUM_THREADS=1 python tests/fuzz/kill_compiles.py --kills 500

Two small random models are compiled over each other, as a file and as a bundle in which the user
keeps files, and to where nothing was. Each compile is a process of its own that SIGKILL ends, most
of them while they write or publish; what is slow before that is done once. After each kill the
artifact is loaded into onnxruntime and must give the logits of the one model or the other; what
killed compiles leave is never cleared away, so each compile begins with it.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib.util
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alloc_moe.compiler import artifact, pipeline
from alloc_moe.compiler.api import compile
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.package import weights as weights_file
from alloc_moe.compiler.planning.goals import planner
from alloc_moe.runtime.execution.session import open_session

SMALL = Path(__file__).parents[2] / "examples" / "checkpoints" / "small.py"
USERS = {"notes.txt": "mine", "sub/deep/er.txt": "mine too"}
AGES = ("a", "b")
MOMENTS = {"": 0.1, "staging": 0.4, "publishing": 0.5}
"""From when on compiles are killed, and how many of them: from their start, or a later stage's."""


@dataclass
class Row:
    """What happened to one kind of output."""

    name: str
    kills: int = 0
    finished: int = 0
    loads: collections.Counter[str] = field(default_factory=collections.Counter)
    lost: list[str] = field(default_factory=list)

    def line(self) -> str:
        old, new, none = (self.loads[kind] for kind in ("old", "new", "none"))
        return f"| {self.name} | {self.kills} | {old} | {new} | {none} | {len(self.lost)} |"


def make_models(folder: Path) -> dict[str, Path]:
    """Write two checkpoints of one shape and different weights."""
    spec = importlib.util.spec_from_file_location("small", SMALL)
    assert spec is not None
    assert spec.loader is not None
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    for seed, age in enumerate(AGES):
        torch.manual_seed(seed)
        settings = {**small.FAMILIES["olmoe"], "num_hidden_layers": 2}
        small.save_checkpoint(folder / age, settings)
    files = [folder / age / "model.safetensors" for age in AGES]
    if files[0].read_bytes() == files[1].read_bytes():  # seeded inside
        scale_weights(files[1])
    return {age: folder / age for age in AGES}


def scale_weights(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor * 1.5 for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def cache_slow_stages() -> None:
    """Let what comes before writing be done once for each model, and not in the killed process."""
    for module, name in (
        (pipeline, "load_model"),
        (pipeline, "measure_sensitivity"),
        (pipeline, "fit_if_possible"),
        (planner, "make_planned"),
        (artifact, "export_model"),
        (artifact, "verify_artifact"),
    ):
        setattr(module, name, remembered(getattr(module, name)))
    weights_file._COMMIT_BYTES = 1 << 14


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    found: dict[str, Any] = {}

    def call(*args: Any, **options: Any) -> Any:
        if Current.age not in found:
            found[Current.age] = function(*args, **options)
        return found[Current.age]

    return call


class Current:
    """The model that is compiled, as the stages that are done once don't ask for it."""

    age = ""


def run_compile(model: Path, output: str, *, force: bool, started: int | None = None) -> None:
    stages = {"staging": package.staging, "publishing": package.publish}

    def telling(stage: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if started is not None:
                os.write(started, f"{stage}\n".encode())
            return stages[stage](*args, **options)

        return call

    package.staging, package.publish = map(telling, stages)  # type: ignore[assignment]
    Current.age = model.name
    try:
        compile(model, output=output, tokens=256, force=force)
    finally:
        package.staging, package.publish = stages.values()  # type: ignore[assignment]


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Start a process; return its id and where it tells how far it is."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        code = 1
        try:
            work(tell)
            code = 0
        except Exception as error:
            os.write(tell, f"! {type(error).__name__}: {error}".encode())
        finally:
            os._exit(code)
    os.close(tell)
    return child, told


def waited(child: int, told: int) -> str:
    """Return what a process says, when it has ended; ``!`` and why if it failed."""
    said = b""
    while chunk := os.read(told, 1 << 16):
        said += chunk
    os.close(told)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"! signal {os.WTERMSIG(status)}"
    return said.decode()


def logits_of(path: Path) -> str:
    """Return a digest of what an artifact computes, or why it can't be loaded."""

    def load(tell: int) -> None:
        session = open_session(path, ep="cpu", threads=1)
        session.files.check_data()
        output = session.run(np.arange(16)[None], cache=session.empty_cache(1, capacity=16))
        os.write(tell, hashlib.sha256(np.ascontiguousarray(output.logits)).hexdigest().encode())

    return waited(*forked(load))


def wait_for(stage: str, told: int) -> None:
    """Wait until a compile comes to a stage, or ends."""
    said = b""
    while stage.encode() not in said and (chunk := os.read(told, 1 << 16)):
        said += chunk


def killed_compile(model: Path, output: str, stage: str, delay: float, *, force: bool) -> bool:
    """Compile, and kill that some time after a stage begins; return whether it still ran."""
    child, told = forked(lambda tell: run_compile(model, output, force=force, started=tell))
    wait_for(stage, told)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return waited(child, told).startswith("! signal")


def whole_compile(model: Path, output: str, *, force: bool) -> tuple[str, dict[str, float]]:
    """Compile; return what went wrong, and the seconds from the start of each stage to the end."""
    starts = {}
    child, told = forked(lambda tell: run_compile(model, output, force=force, started=tell))
    for stage in MOMENTS:
        wait_for(stage, told)
        starts[stage] = time.monotonic()
    said = waited(child, told)
    return said.partition("!")[2], {s: time.monotonic() - start for s, start in starts.items()}


def user_files(folder: Path) -> list[str]:
    """Return which of the user's files are not as they were."""
    files = {name: folder / name for name in USERS}
    return [n for n, file in files.items() if not file.is_file() or file.read_text() != USERS[n]]


class Campaign:
    """Compiles of one kind of output, killed."""

    def __init__(self, models: dict[str, Path], work: Path, seed: int) -> None:
        self._models, self._work = models, work
        self._random = random.Random(seed)
        self.logits: dict[str, str] = {}
        for age, model in models.items():
            (work / "reference").mkdir(exist_ok=True)
            path = work / "reference" / f"{age}.onnx"
            run_compile(model, str(path), force=False)  # here, to remember the slow stages
        seconds: list[dict[str, float]] = []
        for age, model in models.items():
            path = work / "reference" / f"{age}.onnx"
            wrong, took = whole_compile(model, str(path), force=True)
            assert not wrong, wrong
            seconds.append(took)
            self.logits[logits_of(path)] = age
        assert len(self.logits) == len(AGES), self.logits
        self.seconds = {stage: max(each[stage] for each in seconds) for stage in MOMENTS}

    def _moment(self) -> tuple[str, float]:
        """Return the stage after whose start to kill, and how long after."""
        [stage] = self._random.choices(list(MOMENTS), list(MOMENTS.values()))
        return stage, self._random.uniform(0, 1.1 * self.seconds[stage])

    def replace(self, name: str, kills: int, *, bundle: bool) -> Row:
        """Kill compiles that replace an artifact; each goes on with what is left."""
        row = Row(name)
        folder = self._work / name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        output = f"{folder}/half/" if bundle else f"{folder}/out.onnx"
        path = Path(output)
        wrong, _ = whole_compile(self._models["a"], output, force=False)
        assert not wrong, wrong
        if bundle:
            for file, content in USERS.items():
                (path / file).parent.mkdir(parents=True, exist_ok=True)
                (path / file).write_text(content)
        names = sorted(os.listdir(folder))
        age = "a"
        while row.kills < kills:
            other = "b" if age == "a" else "a"
            killed = killed_compile(self._models[other], output, *self._moment(), force=True)
            row.kills += killed
            row.finished += not killed
            age = self._judge(row, path, old=age, new=other, users=bundle, killed=killed)
            if row.kills % 10 == 9 or not age:
                other = "b" if age == "a" else "a"
                wrong, _ = whole_compile(self._models[other], output, force=True)
                if wrong:
                    row.lost.append(f"the next compile: {wrong}")
                age = self._judge(row, path, old="", new=other, users=bundle, killed=False)
                if sorted(os.listdir(folder)) != names:
                    row.lost.append(f"left behind: {sorted(os.listdir(folder))}")
        return row

    def make(self, name: str, kills: int, *, bundle: bool) -> Row:
        """Kill compiles to where nothing was, and compile again."""
        row = Row(name)
        while row.kills < kills:
            with tempfile.TemporaryDirectory(dir=self._work) as temporary:
                output = f"{temporary}/half/" if bundle else f"{temporary}/out.onnx"
                killed = killed_compile(self._models["a"], output, *self._moment(), force=False)
                row.kills += killed
                row.finished += not killed
                path = Path(output)
                there = path.exists()
                if there:
                    self._judge(row, path, old="", new="a", users=False, killed=killed)
                else:
                    row.loads["none"] += killed
                wrong, _ = whole_compile(self._models["b"], output, force=there)
                if wrong:
                    row.lost.append(f"the next compile: {wrong}")
                self._judge(row, path, old="", new="b", users=False, killed=False)
        return row

    def _judge(self, row: Row, path: Path, *, old: str, new: str, users: bool, killed: bool) -> str:
        found = logits_of(path)
        age = self.logits.get(found, "")
        kind = {old: "old", new: "new"}.get(age) if age else None
        if kind is None:
            row.lost.append(f"{path} gives {found}")
        elif killed:
            row.loads[kind] += 1
        if users and (missing := user_files(path)):
            row.lost.append(f"not as they were: {missing}")
        return age


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=500, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cache_slow_stages()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        campaign = Campaign(make_models(work), work, options.seed)
        print(f"Seconds to the end: {campaign.seconds}", file=sys.stderr)
        share = max(1, options.kills // 5)
        rows = []
        for run, name, kills, bundle in (
            (campaign.replace, "file, --force", 2 * share, False),
            (campaign.replace, "bundle, --force", 2 * share, True),
            (campaign.make, "file, new", share // 2, False),
            (campaign.make, "bundle, new", share - share // 2, True),
        ):
            rows.append(run(name, kills, bundle=bundle))
            print(rows[-1].line(), file=sys.stderr, flush=True)
    print("| output | kills | old loads | new loads | none was, none is | lost or wrong |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("\n".join(row.line() for row in rows))
    print(f"{sum(row.kills for row in rows)} kills in {time.monotonic() - start:.0f} s")
    for row in rows:
        for line in row.lost:
            print(f"{row.name}: {line}")
    sys.exit(any(row.lost for row in rows))


if __name__ == "__main__":
    main()
