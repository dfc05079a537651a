"""Files that are replaced in one step, by nobody's link and with no rest where the disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from alloc_moe.compiler.errors import OutputError
from alloc_moe.compiler.workspace import files
from alloc_moe.compiler.workspace.files import load_tensors, save_tensors, save_text
from alloc_moe.compiler.workspace.processes import Processes
from alloc_moe.compiler.workspace.results import SavedResults, results_path
from alloc_moe.compiler.workspace.states import LayerProgress, LayerStates
from alloc_moe.compiler.workspace.unfinished import unfinished


def text(path: Path) -> None:
    save_text("new", path, what="The profile")


def tensors(path: Path) -> None:
    save_tensors([torch.ones(3)], path, what="The states", then="choose another path")


KINDS = [text, tensors]


@pytest.mark.parametrize("save", KINDS)
def test_a_folder_in_the_way_is_reported(tmp_path: Path, save: Callable[[Path], None]) -> None:
    (tmp_path / "a.bin" / "sub").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"can't be saved as .*a\.bin: Is a directory\. Choose"):
        save(tmp_path / "a.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_what_a_kill_left_of_a_text_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / ".a.bin.0123abcd.partial").write_text("half of it")
    (tmp_path / "thesis.txt").write_text("precious")
    links = [tmp_path / ".a.bin.aaaaaaaa.partial", tmp_path / ".a.bin.aaaaaaaa.partial.partial"]
    others = [tmp_path / ".b.bin.0123abcd.partial", tmp_path / ".a.bin.partial"]
    for link in links:
        link.symlink_to(tmp_path / "thesis.txt")
    for other in others:
        other.write_text("another's")
    text(tmp_path / "a.bin")
    assert {*tmp_path.iterdir()} == {tmp_path / "a.bin", tmp_path / "thesis.txt", *links, *others}
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("save", KINDS)
def test_an_interruption_leaves_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[[Path], None]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="open files can't be removed there")
def test_what_another_is_writing_stays(tmp_path: Path) -> None:
    with unfinished(tmp_path / "a.bin") as (partial, file):
        file.write(b"other")
        text(tmp_path / "a.bin")
        assert (tmp_path / "a.bin").read_text() == "new"
        file.flush()
        assert partial.read_text() == "other"
    text(tmp_path / "a.bin")
    assert not partial.exists()


@pytest.mark.parametrize("save", [save_text, save_tensors])
def test_of_several_that_write_a_file_at_once_it_has_one_whole(
    tmp_path: Path, save: Callable[..., None]
) -> None:
    path, sizes = tmp_path / "a.bin", (1, 50_000, 100_000)

    def write(size: int) -> None:
        for _ in range(25):
            if save is save_text:
                save_text("x" * size, path, what="The profile")
            else:
                save_tensors([torch.ones(size)], path, what="The states", then="wait")
            lengths.append(len(path.read_bytes() if save is save_text else load_tensors(path)[0]))

    lengths: list[int] = []
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(write, sizes))
    assert {*lengths} <= {*sizes}
    assert len(lengths) == 75
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize(
    ("code", "help_"), [(errno.EDQUOT, "Free some space"), (errno.EIO, "Choo")]
)
@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_a_text_that_cant_be_written_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, help_: str
) -> None:
    path = tmp_path / "a.bin"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    class Full:
        """A file on a full disk."""

        write = staticmethod(fail)

    @contextlib.contextmanager
    def full(path: Path) -> Iterator[tuple[Path, Full]]:
        with unfinished(path) as (partial, _):
            yield partial, Full()

    if call == "write":
        monkeypatch.setattr(files, "unfinished", full)
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match=rf"The profile can't be saved as .*a\.bin: .*\. {help_}"):
        text(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.bin", "old")]


def test_results_are_believed_and_deleted_in_our_folder_only(tmp_path: Path) -> None:
    folder = results_path(tmp_path / "out.onnx")
    results = SavedResults(folder)
    results.keep([1], [torch.ones(2)])
    kept = results.find([1])
    assert kept is not None
    assert kept[0].tolist() == [1, 1]
    other = folder.rename(tmp_path / "other")
    folder.symlink_to(other)
    assert results.find([1]) is None
    results.forget([1])
    results.delete()
    with pytest.raises(OutputError, match="is a link, so it is no work folder"):
        results.keep([1], [torch.ones(2)])
    folder.unlink()
    other.rename(folder)
    (folder / "thesis.txt").write_text("precious")
    results.delete()
    assert {path.name for path in folder.iterdir()} == {".alloc-moe", "thesis.txt"}
    (folder / "thesis.txt").unlink()
    results.delete()
    assert list(tmp_path.iterdir()) == []


def test_states_are_kept_in_our_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / ".p.states"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "progress.json").write_text("{}")
    folder.symlink_to(tmp_path / "other")
    states = LayerStates(folder, {}, Processes())
    with pytest.raises(OutputError, match="is a link, so it is no work folder"):
        states.progress()
    states.delete()
    assert (tmp_path / "other" / "progress.json").exists()
    folder.unlink()
    assert states.progress() is None
    states.save("entering-0", [torch.ones(1)])
    assert states.load("entering-0")[0].tolist() == [1]
    states.delete()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_how_far_states_got_is_found_without_reading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = LayerProgress("forward", 1, 0.0, ((1.0,),))
    states = LayerStates(tmp_path / ".p.states", {"of": 1}, Processes())
    assert states.progress() is None
    states.save("entering-1", [torch.ones(1000)])
    states.commit(progress)
    monkeypatch.setattr("alloc_moe.compiler.workspace.states.load_tensors", None)
    assert states.progress() == progress
    [file] = (tmp_path / ".p.states").glob("entering-1*")
    file.write_bytes(file.read_bytes()[:-1])
    assert states.progress() is None


@pytest.mark.skipif(sys.platform == "win32", reason="folders can't be locked there")
def test_states_are_one_runs_at_a_time(tmp_path: Path) -> None:
    first, second = (LayerStates(tmp_path / ".p.states", {}, Processes()) for _ in range(2))
    with first.held():
        first.save("entering-0", [torch.ones(1)])
        with (
            pytest.raises(
                OutputError, match=r"Another compile keeps its states in .*\.p\.states\. W"
            ),
            second.held(),
        ):
            pass
    with second.held():
        assert second.load("entering-0")[0].tolist() == [1]
        second.delete()
    assert list(tmp_path.iterdir()) == []
