"""Artifacts replaced while the process may be killed at any moment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alloc_moe.compiler.package.output import Output, publish, staging
from alloc_moe.runtime.artifact.plan import MODEL_FILE, PLAN_FILE


class Killed(BaseException):
    """Stands for the end of the process."""


# parse_output


def write(folder: Path, names: tuple[str, ...], content: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(f"{content} {name}")


def dying(monkeypatch: pytest.MonkeyPatch, *, after: int) -> Callable[[], int]:
    """Let the process die at the call after so many moves and deletions; return their count."""
    count = 0

    def limited(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == after:
                raise Killed
            count += 1
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "replace"), (Path, "unlink"), (os, "fsync")):
        monkeypatch.setattr(owner, name, limited(getattr(owner, name)))
    return lambda: count


PAIR = ("out.onnx", "out.onnx.data")
BUNDLE = (MODEL_FILE, f"{MODEL_FILE}.data", PLAN_FILE, "config.json")


def publish_until_killed(
    tmp_path: Path, output: Output, names: tuple[str, ...], *, old: bool, after: int
) -> bool:
    """Publish new files, over old ones if `old`; return whether it came to its end."""
    target = output.path if output.bundle else output.path.parent
    if old:
        write(target, names, "old")
    staged = tmp_path / "staged"
    write(staged, names, "new")
    with pytest.MonkeyPatch.context() as patched:
        dying(patched, after=after)
        try:
            publish(staged, output)
        except Killed:
            return False
    return True


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("bundle", [False, True])
def test_a_kill_at_any_moment_never_mixes_two_artifacts(
    tmp_path: Path, bundle: bool, old: bool
) -> None:
    names = BUNDLE if bundle else PAIR
    finished = False
    moments = 0
    seen = set()
    while not finished:
        folder = tmp_path / str(moments)
        folder.mkdir()
        output = Output(folder / ("half" if bundle else "out.onnx"), bundle=bundle)
        finished = publish_until_killed(folder, output, names, old=old, after=moments)
        moments += 1
        graph = output.path / MODEL_FILE if bundle else output.path
        if not graph.exists():  # no artifact without its graph
            seen.add("none")
            continue
        [age] = {(graph.parent / name).read_text().split()[0] for name in names}
        seen.add(age)
    assert moments > len(names)
    assert seen == ({"old", "none", "new"} if old else {"none", "new"})


@pytest.mark.parametrize("bundle", [False, True])
def test_publishing_again_after_a_kill_succeeds(tmp_path: Path, bundle: bool) -> None:
    names = BUNDLE if bundle else PAIR
    for moment in range(12):
        folder = tmp_path / str(moment)
        folder.mkdir()
        output = Output(folder / ("half" if bundle else "out.onnx"), bundle=bundle)
        publish_until_killed(folder, output, names, old=True, after=moment)
        with staging(output) as staged:
            write(staged, names, "newer")
            publish(staged, output)
        graph = output.path / MODEL_FILE if bundle else output.path
        assert {(graph.parent / name).read_text().split()[0] for name in names} == {"newer"}


def test_a_bundle_that_cant_be_moved_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(tmp_path / "half", bundle=True)
    write(output.path, BUNDLE, "old")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise PermissionError("busy")
        replace(source, target)

    with staging(output) as staged:
        write(staged, BUNDLE, "new")
        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(PermissionError):
            publish(staged, output)
    assert {path.read_text().split()[0] for path in output.path.iterdir()} == {"old"}


# contents
