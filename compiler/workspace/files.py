"""Files of results that survive an interruption; small ones are replaced in one step."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from alloc_moe.compiler.errors import OutputError
from alloc_moe.compiler.workspace.unfinished import (
    drop_unfinished,
    owned,
    unfinished,
    unfinished_path,
)

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def explained(what: str, path: Path, *, then: str = "choose another path") -> Iterator[None]:
    """Make an OSError of the block one sentence on what can't be written.

    Args:
        what: What is written, for the message: ``The profile``.
        path: Where to.
        then: What helps, for the message.

    Raises:
        OutputError: In place of the OSError.
    """
    try:
        yield
    except OSError as error:
        raise cant_write(what, path, error, then=then) from error


def cant_write(
    what: str, path: Path, error: OSError | str, *, then: str = "choose another path"
) -> OutputError:
    """Return the error that says what can't be written, why, and what helps."""
    reason = error if isinstance(error, str) else error.strerror or str(error)
    full = isinstance(error, OSError) and error.errno in _FULL
    help_ = f"Free some space, or {then}." if full else f"{then[:1].upper()}{then[1:]}."
    return OutputError(f"{what} can't be saved as {path}: {reason}. {help_}")


@contextlib.contextmanager
def temporary_folder(folder: Path | None, prefix: str) -> Iterator[Path]:
    """Yield a new folder in another, or where temporary files go, that is gone after the block.

    Raises:
        OutputError: It can't be made.
    """
    with explained("Temporary files", folder or Path(tempfile.gettempdir())):
        temporary = tempfile.TemporaryDirectory(
            dir=folder, prefix=prefix, ignore_cleanup_errors=True
        )
    with temporary as name:
        yield Path(name)


def discard(path: Path) -> None:
    """Remove a file that an earlier run left under a name that only we write, if there is one.

    Raises:
        OutputError: It isn't ours: a link, a folder, or another user's.
    """
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(info.st_mode) or not owned(info, path):
        raise OutputError(
            f"{path} is {_kind(info)}, where alloc-moe writes a file of its own. Move it away, "
            "or choose another output."
        )
    path.unlink()


def create(path: Path) -> BinaryIO:
    """Return a new file under a name that only we write: never one that a link leads to."""
    discard(path)
    return path.open("x+b")


def save_text(text: str, path: Path, *, what: str) -> None:
    """Replace the file in one step, so that an interruption leaves the old one or the new one.

    So do several processes that write it at once: the last one's is there.

    Args:
        text: All of its content.
        path: Where to; its folder must exist.
        what: What it holds, for the message: ``The profile``.

    Raises:
        OutputError: It can't be written there.
    """
    drop_unfinished(path)
    with explained(what, path), unfinished(path) as (partial, file), _replacing(path, partial):
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
        if sys.platform == "win32":
            file.close()  # what is open can't take another's place there


def save_tensors(tensors: Sequence[torch.Tensor], path: Path, *, what: str, then: str) -> None:
    """Replace a file of tensors in one step.

    Args:
        tensors: In their order.
        path: Where to, in a folder that exists.
        what: What they are, for the message.
        then: What helps, for the message: ``choose another path``.

    Raises:
        OutputError: They can't be written there.
    """
    partial = unfinished_path(path)
    try:
        with explained(what, path, then=then), _replacing(path, partial):
            partial.open("xb").close()
            save_file({str(i): tensor.contiguous() for i, tensor in enumerate(tensors)}, partial)
    except SafetensorError as error:  # a disk that is full, among others
        raise cant_write(what, path, str(error), then=f"free some space, or {then}") from error


@contextlib.contextmanager
def _replacing(path: Path, partial: Path) -> Iterator[None]:
    """Let a file take the place of `path` if the block fills it; else it is gone."""
    try:
        yield
        os.replace(partial, path)
    except BaseException:  # an interruption too
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _kind(info: os.stat_result) -> str:
    if stat.S_ISLNK(info.st_mode):
        return "a link"
    if stat.S_ISDIR(info.st_mode):
        return "a folder"
    return "another user's file" if stat.S_ISREG(info.st_mode) else "no regular file"


def has_tensors(path: Path) -> bool:
    """Whether there is a whole file of `save_tensors` with any, without reading them."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        return bool(file.keys())
    return False


def load_tensors(path: Path) -> list[torch.Tensor]:
    """Return what `save_tensors` was given."""
    named = load_file(path)
    return [named[str(index)] for index in range(len(named))]


def sync(path: Path) -> None:
    """Wait until a file, or which files a folder has, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows can't open a folder to sync it
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_format(data: Mapping[str, Any], supported: int) -> None:
    """Raise ValueError unless the file's content is of the format that this version reads."""
    if data["format"] != supported:
        raise ValueError(f"format {data['format']}, this version reads {supported}")
