"""Folders of work beside an output: real, this user's, and marked, so that only ours are emptied.

A name such as ``.out.onnx.partial`` may be taken: by a link, by another user, by what the user put
there. Nothing is written to such a folder, nothing in it is believed, and nothing in it is removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from alloc_moe.compiler.errors import OutputError
from alloc_moe.compiler.workspace.files import explained
from alloc_moe.compiler.workspace.unfinished import owned, whole_name

MARK = ".alloc-moe"
_SAID = b"Work of alloc-moe that was interrupted or goes on. Deleting this folder gives it up.\n"
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_DIRECTORY", 0)


class OpenFolder:
    """A folder held open: its entries are its own even if its path is given to another meanwhile.

    Windows can't open folders: there the path is used.
    """

    def __init__(self, path: Path) -> None:
        """Open it; an OSError says that it is a link or no folder."""
        self.path = path
        self.descriptor: int | None = None
        if sys.platform != "win32":
            self.descriptor = os.open(path, os.O_RDONLY | _NO_LINK)

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)

    def names(self) -> list[str]:
        return sorted(os.listdir(self.path if self.descriptor is None else self.descriptor))

    def info(self, name: str) -> os.stat_result:
        """Return what is known of an entry, of a link itself if it is one."""
        if self.descriptor is None:
            return os.lstat(self.path / name)
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)

    def is_file(self, name: str) -> bool:
        return stat.S_ISREG(self.info(name).st_mode)

    def unlink(self, name: str) -> None:
        if self.descriptor is None:
            os.unlink(self.path / name)
        else:
            os.unlink(name, dir_fd=self.descriptor)

    def is_at_its_path(self) -> bool:
        """Whether it has not been removed, or replaced, since it was opened."""
        if self.descriptor is None:
            return True
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self.descriptor), os.lstat(self.path))
        return False


def claim(folder: Path) -> None:
    """Make a work folder, unless an earlier run did.

    Raises:
        OutputError: Its name is taken by something else, or it can't be made.
    """
    with explained("The work folder", folder):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        with opened(folder) as found:
            if MARK not in found.names():
                _mark(folder)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[OpenFolder]:
    """Open a work folder that `claim` made, or that is empty.

    Raises:
        OutputError: It is none.
    """
    if wrong := _wrong(folder):
        raise OutputError(
            f"{folder} {wrong}, so it is no work folder of alloc-moe, which would be emptied. "
            "Move it away, or choose another output."
        )
    found = OpenFolder(folder)
    try:
        yield found
    finally:
        found.close()


@contextlib.contextmanager
def held(folder: Path, busy: str) -> Iterator[OpenFolder]:
    """Claim a work folder for this process alone, by a lock that goes when the process ends.

    Afterwards the folder is gone if nothing is in it.

    Args:
        folder: The folder.
        busy: What to say where another process has it: ``Another compile is writing out.onnx``.

    Raises:
        OutputError: Another has it, its name is taken by something else, or it can't be made.
    """
    while True:
        claim(folder)
        with opened(folder) as found:
            if not _lock(found):
                raise OutputError(f"{busy}. Wait for it, or choose another output.")
            if not found.is_at_its_path():
                continue  # who had it removed it meanwhile
            try:
                yield found
            finally:
                with contextlib.suppress(OSError):
                    remove_if_empty(found)
            return


def _lock(found: OpenFolder) -> bool:
    """Lock a folder until it is closed; False where another process has."""
    if sys.platform == "win32":
        return True
    import fcntl

    assert found.descriptor is not None
    try:
        fcntl.flock(found.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_ours(folder: Path) -> bool:
    """Whether there is a work folder that `claim` made."""
    with contextlib.suppress(OSError):
        return _wrong(folder) is None and (folder / MARK).is_file()
    return False


def remove(folder: Path, ours: re.Pattern[str]) -> None:
    """Remove a work folder and the files in it whose whole names match, unfinished ones too.

    Whatever else is in it stays, and the folder with it. That something can't be removed is no
    reason to fail.
    """
    if not is_ours(folder):
        return
    with contextlib.suppress(OSError), opened(folder) as found:
        for name in found.names():
            if ours.fullmatch(whole_name(name)) and found.is_file(name):
                found.unlink(name)
        remove_if_empty(found)


def remove_if_empty(found: OpenFolder) -> bool:
    """Remove a work folder in which nothing but its mark is left; return whether it was so."""
    if found.names() not in ([], [MARK]) or not found.is_at_its_path():
        return False
    with contextlib.suppress(FileNotFoundError):
        found.unlink(MARK)
    found.path.rmdir()
    return True


def _mark(folder: Path) -> None:
    # Several processes may claim a folder at once; that it is there is all that the mark says.
    with contextlib.suppress(FileExistsError), (folder / MARK).open("xb") as file:
        file.write(_SAID)


def _wrong(folder: Path) -> str | None:
    """Return why a folder is not ours, in words that follow its path; an empty one is."""
    info = os.lstat(folder)
    if stat.S_ISLNK(info.st_mode):
        return "is a link"
    if not stat.S_ISDIR(info.st_mode):
        return "is no folder"
    if not owned(info, folder):
        return "belongs to another user"
    names = os.listdir(folder)
    if not names:
        return None
    if MARK not in names or not stat.S_ISREG(os.lstat(folder / MARK).st_mode):
        return f"lacks the mark {MARK}"
    return None
