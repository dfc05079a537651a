"""Small artifacts that show whether their parts belong together, and disks that fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import onnx
import pytest

from alloc_moe.compiler.package import folder as folder_module
from alloc_moe.compiler.package.output import (
    FILES,
    Output,
    data_path,
    parse_output,
    publish,
    staging,
)
from alloc_moe.compiler.workspace.files import explained
from alloc_moe.runtime.artifact.plan import MODEL_FILE, PLAN_FILE

CHANGES = ("replace", "rename", "unlink", "link", "mkdir", "rmdir", "fsync")
"""The calls that change which files there are, or wait for the disk."""


class Killed(BaseException):
    """Stands for the end of the process."""


class Disk:
    """Counts calls that change the disk, and lets some end in an exception."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self._wrong: Callable[[int], BaseException | None] = lambda _: None
        patch.setattr(os, "fsync", lambda _: None)  # it would take most of the time
        for name in CHANGES:
            patch.setattr(os, name, self._counted(getattr(os, name)))
        patch.setattr(folder_module, "exchange", self._counted(folder_module.exchange))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if error := self._wrong(self.calls - 1):
                raise error
            return function(*args, **options)

        return call

    @contextmanager
    def killed_at(self, moment: int) -> Iterator[None]:
        """Let the process die before a call: none has an effect from then on."""
        dead = self._wrong_from(lambda call: Killed() if call >= moment else None)
        with dead, suppress(Killed):
            yield

    @contextmanager
    def failing_at(
        self, moment: int, *, code: int = errno.EIO, ever: bool = False
    ) -> Iterator[None]:
        """Let a call fail, with `ever` all after it too."""

        def wrong(call: int) -> OSError | None:
            fails = call == moment or (ever and call > moment)
            return OSError(code, os.strerror(code)) if fails else None

        with self._wrong_from(wrong):
            yield

    @contextmanager
    def _wrong_from(self, wrong: Callable[[int], BaseException | None]) -> Iterator[None]:
        self.calls, self._wrong = 0, wrong
        try:
            yield
        finally:
            self._wrong = lambda _: None


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def save_pair(graph: Path, age: str) -> None:
    """Write a graph and its data, both of an age."""
    model = onnx.ModelProto(producer_name=age)
    tensor = model.graph.initializer.add(name="w", data_type=onnx.TensorProto.UINT8, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=data_path(graph).name)
    graph.write_bytes(model.SerializeToString())
    data_path(graph).write_text(age)


def age_of_pair(graph: Path) -> str:
    """Return the age of a graph, which the data that it names must have too."""
    model = onnx.ModelProto.FromString(graph.read_bytes())
    [tensor] = model.graph.initializer
    [name] = [entry.value for entry in tensor.external_data if entry.key == "location"]
    assert (graph.parent / name).read_text() == model.producer_name
    return str(model.producer_name)


class Artifacts:
    """An output, and artifacts of several ages written to it."""

    USERS: ClassVar = {
        "notes.txt": "mine",
        "sub/a/deep.txt": "mine too",
        "config.json.old": "also mine",
    }

    def __init__(self, folder: Path, *, bundle: bool) -> None:
        folder.mkdir(exist_ok=True)
        self.text = f"{folder}/half/" if bundle else f"{folder}/out.onnx"
        self.output = Output(folder / ("half" if bundle else "out.onnx"), bundle=bundle)
        self.graph = self.output.path / MODEL_FILE if bundle else self.output.path

    def write(self, folder: Path, age: str) -> None:
        save_pair(folder / self.output.graph_name, age)
        if not self.output.bundle:
            return
        with explained("The bundle's files", folder):
            (folder / FILES).mkdir()
            for name in (PLAN_FILE, "config.json", f"only-{age}.json"):
                (folder / FILES / name).write_text(age)

    def publish(self, age: str, *, force: bool = True) -> None:
        """Do what a compile does at its end."""
        output = parse_output(self.text, force=force)
        with staging(output) as staged:
            self.write(staged, age)
            publish(staged, output)

    def add_users_files(self) -> None:
        for name, content in self.USERS.items() if self.output.bundle else ():
            path = self.output.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    def age(self) -> str | None:
        """Return how old the artifact is, all its parts alike; None if there is none."""
        if not self.graph.exists():
            return None
        age = age_of_pair(self.graph)
        if self.output.bundle:
            for name in (PLAN_FILE, "config.json", f"only-{age}.json"):
                assert (self.output.path / name).read_text() == age
        return age

    def users_files(self) -> dict[str, str]:
        """Return what is left of the user's files where they were."""
        paths = {name: self.output.path / name for name in self.USERS}
        return {name: path.read_text() for name, path in paths.items() if path.is_file()}

    def names(self) -> set[str]:
        """Return everything in the folder of the output, and in the output."""
        top = self.output.path.parent
        return {path.relative_to(top).as_posix() for path in top.rglob("*") if not path.is_dir()}


@pytest.fixture
def artifacts(tmp_path: Path) -> Callable[..., Artifacts]:
    """Return a function that makes a fresh folder for an output."""
    made = 0

    def make(*, bundle: bool, old: bool = False) -> Artifacts:
        nonlocal made
        made += 1
        found = Artifacts(tmp_path / str(made), bundle=bundle)
        if old:
            found.publish("old")
            found.add_users_files()
        return found

    return make
