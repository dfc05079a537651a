"""Texts from files, pipes and the command line, in UTF-8 whatever the locale says."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from alloc_moe.runtime.errors import AllocMoeError

# What a shell puts there for <(...) and for stdin; any other pipe might never be written to.
_STREAMS = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")


def argument_text(text: str) -> str:
    """Return an argument as the text it is, which a locale such as C keeps from being decoded.

    Raises:
        BadParameter: It is no UTF-8.
    """
    try:
        return os.fsencode(text).decode()
    except UnicodeError as error:
        raise click.BadParameter(f"{text[:40]!r} is no UTF-8 text: {error}.") from error


def read_text(path: str | Path) -> str:
    """Return the text in a file; ``-`` is stdin.

    Raises:
        AllocMoeError: It can't be read, is no file, or no UTF-8.
    """
    try:
        content = _content(path)
    except (OSError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is too large for the memory"
        raise AllocMoeError(
            f"The text {path} can't be read: {reason}. Give a UTF-8 file."
        ) from error
    try:
        return str(content, "utf-8")
    except UnicodeDecodeError as error:
        raise AllocMoeError(f"{path} is no UTF-8 text, so it can't be read: {error}.") from error


def _content(path: str | Path) -> bytes:
    if str(path) == "-":
        if sys.stdin is None:
            raise AllocMoeError("The text can't be read: stdin is closed. Give a UTF-8 file.")
        return sys.stdin.buffer.read()
    if not (Path(path).is_file() or str(path).startswith(_STREAMS)) and Path(path).exists():
        raise AllocMoeError(
            f"The text {path} can't be read: it is a folder, pipe or device. Give a UTF-8 file."
        )
    return Path(path).read_bytes()
