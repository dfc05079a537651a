"""What is read of torch's archives without torch."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from alloc_moe.runtime.artifact.checking import check_all
from alloc_moe.runtime.artifact.files import find_artifact
from alloc_moe.runtime.artifact.plan import PLAN_KEY
from alloc_moe.runtime.artifact.torch_file import add_metadata, damaged_entry, read_metadata
from alloc_moe.runtime.errors import ArtifactError


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Return an archive as torch writes them, without metadata."""
    path = tmp_path / "out.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("out/version", "3")
        file.writestr("out/constants/0", b"\x07" * 500)
        file.writestr("out/extra/else", "not ours")
    return path


def test_what_is_added_is_read(archive: Path) -> None:
    metadata = {"alloc_moe.plan": "{}", "alloc_moe.tokenizer": "ä"}
    add_metadata(archive, metadata)
    assert read_metadata(archive) == metadata
    assert damaged_entry(archive) is None


def test_the_same_metadata_make_the_same_file(archive: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pt"
    copy.write_bytes(archive.read_bytes())
    add_metadata(archive, {"alloc_moe.plan": "{}"})
    add_metadata(copy, {"alloc_moe.plan": "{}"})
    assert archive.read_bytes() == copy.read_bytes()


def test_an_artifact_is_found_by_its_plan(archive: Path, toy_artifact: object) -> None:
    add_metadata(archive, {PLAN_KEY: toy_artifact.PLAN.to_json()})  # type: ignore[attr-defined]
    files = find_artifact(archive)
    assert files.is_torch
    assert files.plan == toy_artifact.PLAN  # type: ignore[attr-defined]
    assert check_all(files) == {"out.pt": archive.stat().st_size}


def test_a_changed_byte_is_found(archive: Path, toy_artifact: object) -> None:
    add_metadata(archive, {PLAN_KEY: toy_artifact.PLAN.to_json()})  # type: ignore[attr-defined]
    content = bytearray(archive.read_bytes())
    content[content.index(b"\x07" * 500) + 250] ^= 1
    archive.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"out\.pt is damaged: out/constants/0 in it differs"):
        check_all(find_artifact(archive))


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_an_archive_of_others_is_told(archive: Path, suffix: str) -> None:
    path = archive.rename(archive.with_suffix(suffix))
    with pytest.raises(ArtifactError, match=r"was not compiled by alloc-moe: its metadata has no"):
        find_artifact(path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _text(path: Path) -> None:
    path.write_text("not a zip archive")


def _gone(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (_cut, "is no archive of torch, or a damaged one"),
        (_text, "is no archive of torch, or a damaged one"),
        (_gone, "There is no file"),
        (_folder, "is a folder, pipe or device, and no file"),
    ],
)
def test_what_is_no_archive_is_told(
    archive: Path, break_: Callable[[Path], None], message: str
) -> None:
    break_(archive)
    with pytest.raises(ArtifactError, match=re.escape(message)):
        read_metadata(archive)


def test_an_entry_that_is_there_twice_is_refused(archive: Path) -> None:
    add_metadata(archive, {PLAN_KEY: "{}"})
    with pytest.warns(UserWarning, match="Duplicate name"):
        add_metadata(archive, {PLAN_KEY: "{}"})
    with pytest.raises(ArtifactError, match=r"has its alloc_moe\.plan twice"):
        read_metadata(archive)


def test_an_entry_that_would_fill_memory_is_refused(archive: Path) -> None:
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"out/extra/{PLAN_KEY}", bytes(65 << 20))
    with pytest.raises(ArtifactError, match=r"alloc_moe\.plan of 68157440 bytes; 67108864 are"):
        read_metadata(archive)
