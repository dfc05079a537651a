"""Files that are replaced in one step, by nobody's link and with no rest where the disk is full."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alloc_moe.compiler.errors import OutputError
from alloc_moe.compiler.workspace import files
from alloc_moe.compiler.workspace.files import load_tensors, save_tensors, save_text
from alloc_moe.compiler.workspace.processes import Processes
from alloc_moe.compiler.workspace.results import SavedResults, results_path
from alloc_moe.compiler.workspace.states import LayerStates


def text(path: Path) -> None:
    save_text("new", path, what="The profile")


def tensors(path: Path) -> None:
    save_tensors([torch.ones(3)], path, what="The states", then="choose another path")


KINDS = [(text, ".a.bin.partial"), (tensors, "a.0.partial")]


@pytest.mark.parametrize(("save", "partial"), KINDS)
def test_what_a_kill_left_is_replaced(
    tmp_path: Path, save: Callable[[Path], None], partial: str
) -> None:
    (tmp_path / partial).write_text("half of it" * 1000)
    save(tmp_path / "a.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    if save is text:
        assert (tmp_path / "a.bin").read_text() == "new"
    else:
        assert load_tensors(tmp_path / "a.bin")[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("save", "partial"), KINDS)
def test_a_link_in_the_way_is_reported_and_not_followed(
    tmp_path: Path, save: Callable[[Path], None], partial: str
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    (tmp_path / partial).symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(OutputError, match=r"partial is a link, where alloc-moe writes a file"):
        save(tmp_path / "a.bin")
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    assert (tmp_path / partial).is_symlink()


@pytest.mark.parametrize(("save", "partial"), KINDS)
def test_a_folder_in_the_way_is_reported(
    tmp_path: Path, save: Callable[[Path], None], partial: str
) -> None:
    (tmp_path / partial / "sub").mkdir(parents=True)
    with pytest.raises(OutputError, match="partial is a folder, where alloc-moe writes"):
        save(tmp_path / "a.bin")
    (tmp_path / partial / "sub").rmdir()
    (tmp_path / partial).rmdir()
    (tmp_path / "a.bin" / "sub").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"can't be saved as .*a\.bin: Is a directory\. Choose"):
        save(tmp_path / "a.bin")
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

        def __init__(self, path: Path) -> None:
            self._file = path.open("xb", buffering=0)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        write = staticmethod(fail)

    if call == "write":
        monkeypatch.setattr(files, "create", Full)
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
