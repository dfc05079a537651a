"""Work folders: made, recognised, and emptied of nothing but what is ours."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from alloc_moe.compiler.errors import OutputError
from alloc_moe.compiler.workspace.folders import MARK, claim, is_ours, opened, remove

OURS = re.compile(r"[0-9]+\.bin")


def test_a_folder_is_made_for_this_user_and_recognised_later(tmp_path: Path) -> None:
    folder = tmp_path / ".work"
    assert not is_ours(folder)
    claim(folder)
    assert is_ours(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    claim(folder)
    assert [path.name for path in folder.iterdir()] == [MARK]


def test_a_folder_that_cant_be_made_is_reported(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"gone/\.work: No such file or directory\. Choose"):
        claim(tmp_path / "gone" / ".work")


def test_only_our_files_are_removed_and_the_folder_if_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / ".work"
    claim(folder)
    for name in ("1.bin", "2.bin", "notes.txt"):
        (folder / name).write_text("x")
    (folder / "3.bin").mkdir()
    (folder / "4.bin").symlink_to(folder / "notes.txt")
    remove(folder, OURS)
    assert {path.name for path in folder.iterdir()} == {MARK, "notes.txt", "3.bin", "4.bin"}
    for name in ("notes.txt", "4.bin"):
        (folder / name).unlink()
    (folder / "3.bin").rmdir()
    remove(folder, OURS)
    assert list(tmp_path.iterdir()) == []
    remove(folder, OURS)


@pytest.mark.parametrize("marked", [False, True])
def test_nothing_behind_a_link_or_without_a_mark_is_removed(tmp_path: Path, marked: bool) -> None:
    (tmp_path / "other").mkdir()
    if marked:
        claim(tmp_path / "other")
    (tmp_path / "other" / "1.bin").write_text("x")
    (tmp_path / ".work").symlink_to(tmp_path / "other")
    remove(tmp_path / ".work", OURS)
    with pytest.raises(OutputError, match="is a link"):
        claim(tmp_path / ".work")
    assert (tmp_path / "other" / "1.bin").exists()
    if not marked:
        remove(tmp_path / "other", OURS)
        assert (tmp_path / "other" / "1.bin").exists()


def test_a_folder_that_is_open_stays_itself_when_its_path_is_given_away(tmp_path: Path) -> None:
    claim(tmp_path / ".work")
    (tmp_path / ".work" / "1.bin").write_text("ours")
    with opened(tmp_path / ".work") as found:
        (tmp_path / ".work").rename(tmp_path / "moved")
        (tmp_path / ".work").mkdir()
        (tmp_path / ".work" / "1.bin").write_text("another's")
        assert not found.is_at_its_path()
        found.unlink("1.bin")
    assert (tmp_path / ".work" / "1.bin").read_text() == "another's"
