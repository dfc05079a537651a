"""Every write on a disk that is really full: one sentence, and nothing half-written."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from alloc_moe.compiler.errors import OutputError
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.planning.latency import measure_layer
from alloc_moe.compiler.planning.shapes import ExpertShape
from alloc_moe.compiler.workspace.files import save_tensors, save_text
from alloc_moe.compiler.workspace.processes import Processes
from alloc_moe.compiler.workspace.results import SavedResults
from alloc_moe.compiler.workspace.states import LayerStates

PAGE = 4096


@dataclass(frozen=True)
class SmallDisk:
    """A file system of its own, and how much of it is free."""

    path: Path

    def fill(self, free: int) -> None:
        filler = self.path / "filler"
        filler.unlink(missing_ok=True)
        count = shutil.disk_usage(self.path).free - free
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, count)

    def names(self) -> set[str]:
        paths = (path for path in self.path.rglob("*") if path.is_file())
        return {path.relative_to(self.path).as_posix() for path in paths} - {"filler"}

    def shortages(self, act: Callable[[], object], *, step: int) -> list[str]:
        """Act with ever more free space, until it suffices; return what was said until then."""
        said = []
        for free in range(0, 64 * step, step):
            self.fill(free)
            try:
                act()
            except OutputError as error:
                said.append(str(error))
            else:
                return said
        raise AssertionError(said[-1])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"tmpfs can't be mounted here: {done.stderr.strip()}")
    yield SmallDisk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


SAVES: dict[str, Callable[[Path], object]] = {
    "profile": lambda folder: save_text("x" * 9000, folder / "p.json", what="The profile"),
    "tensors": lambda folder: save_tensors(
        [torch.ones(3000)], folder / "a.bin", what="States", then="choose another path"
    ),
    "results": lambda folder: SavedResults(folder / ".passes").keep([1], [torch.ones(3000)]),
    "latency": lambda folder: measure_layer(
        ExpertShape(2, 1, 32, 32), batch=1, rounds=1, folder=folder
    ),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_what_is_saved_meanwhile(small_disk: SmallDisk, save: Callable[[Path], object]) -> None:
    said = small_disk.shortages(lambda: save(small_disk.path), step=PAGE)
    assert said
    for each in said:
        assert str(small_disk.path) in each
        assert "No space left on device" in each
        assert "ree some space" in each
        assert "\n" not in each
    assert not [name for name in small_disk.names() if "partial" in name or "latency" in name]


def test_states_of_a_profile(small_disk: SmallDisk) -> None:
    def save() -> None:
        states = LayerStates(small_disk.path / ".states", {}, Processes())
        states.progress()
        states.save("entering-0", [torch.ones(3000)])

    said = small_disk.shortages(save, step=PAGE)
    assert said
    assert all("No space left on device" in each for each in said)


@pytest.mark.parametrize("bundle", [False, True])
def test_an_artifact_over_an_old_one(
    small_disk: SmallDisk,
    bundle: bool,
    exported: Callable[[str], Any],
    moe_model: Callable[[str], MoeModel],
    plan_for: Callable[..., Any],
) -> None:
    moe = moe_model("olmoe")
    plan = plan_for(moe, [2, 3, 1])
    graph = specialize(exported("olmoe"), plan, device="cpu")
    text = f"{small_disk.path}/half/" if bundle else f"{small_disk.path}/out.onnx"

    def act() -> None:
        output = package.parse_output(text, force=True)
        with package.staging(output) as staged:
            path = staged / output.graph_name
            package.save_graph(graph, path)
            package.stamp(path, plan)
            if bundle:
                package.write_bundle_files(staged / package.FILES, moe, graph, plan)
            package.publish(staged, output)

    act()
    if bundle:
        (small_disk.path / "half" / "notes.txt").write_text("mine")
    before = {name: (small_disk.path / name).read_bytes() for name in small_disk.names()}
    needed = sum(map(len, before.values()))
    said = small_disk.shortages(act, step=needed // 24)
    assert len(said) > 10
    reasons = {each.partition(" can't be ")[0].rpartition("/")[2] for each in said}
    assert len(reasons) > 1
    assert all("No space left on device" in each and "Free some space" in each for each in said)
    assert {name: (small_disk.path / name).read_bytes() for name in small_disk.names()} == before
