"""Moves that a kill can't cut in half: two paths exchanged, and a second name for a file."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

from alloc_moe.compiler.workspace.files import discard, sync

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)

_ONLY_ITSELF = {"follow_symlinks": False} if os.link in os.supports_follow_symlinks else {}


def exchange(first: Path, second: Path) -> bool:
    """Let two paths swap what they lead to, in one step; False where no system call does that.

    Raises:
        OSError: It could be done here, but failed.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if _is_linux() else None
    if call is None:
        return False
    if call(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _is_linux() -> bool:
    return sys.platform == "linux"


def link(path: Path, name: Path) -> bool:
    """Give a file, or a link itself, a second name; False where the file system has no such."""
    try:
        os.link(path, name, **_ONLY_ITSELF)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    return True


def link_or_copy(path: Path, name: Path) -> None:
    """Give a file a second name, or where that is impossible a copy that is surely on disk."""
    if link(path, name):
        return
    try:
        shutil.copy2(path, name)
        sync(name)
    except OSError:
        with contextlib.suppress(OSError):
            discard(name)
        raise
