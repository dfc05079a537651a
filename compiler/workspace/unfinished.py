"""Files under names of their own until they are whole, so that several processes may write one.

Who writes holds a lock that ends with the process: what nobody holds is what a kill left.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_NAME = re.compile(r"\.(?P<whole>.+)\.[0-9a-f]{8}\.partial")


def owned(info: os.stat_result, path: Path) -> bool:
    """Whether what is at `path` belongs to this user.

    Or to whom its folder belongs, who could replace it anyway: some file systems give all files to
    one user.
    """
    if not hasattr(os, "geteuid"):
        return True
    return info.st_uid in (os.geteuid(), path.absolute().parent.stat().st_uid)


def unfinished_path(path: Path) -> Path:
    """Return a name beside a file that no other writer of it has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def whole_name(name: str) -> str:
    """Return what a file will be called once it is whole, which it may be."""
    match = _NAME.fullmatch(name)
    return match["whole"] if match else name


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield a new file that is to take the place of `path`, by its name and open.

    Raises:
        OSError: It can't be made.
    """
    while True:
        partial = unfinished_path(path)
        with partial.open("x+b") as file:
            _hold(file.fileno(), wait=True)
            if partial.exists():  # else another took it for a dead process's before it was held
                yield partial, file
                return


def drop_unfinished(path: Path) -> None:
    """Remove what killed processes left that wrote `path`; what can't be removed stays."""
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if name != path.name and whole_name(name) == path.name:
                with contextlib.suppress(OSError):
                    _unlink_unless_held(path.with_name(name))


def _unlink_unless_held(path: Path) -> None:
    info = os.lstat(path)
    if not stat.S_ISREG(info.st_mode) or not owned(info, path):
        return
    if sys.platform == "win32":
        path.unlink()  # which fails while it is open
        return
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        if _hold(descriptor, wait=False):
            path.unlink()
    finally:
        os.close(descriptor)


def _hold(descriptor: int, *, wait: bool) -> bool:
    """Lock a file until it is closed; False where another has, or there are no locks."""
    if sys.platform == "win32":
        return False
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    return False
