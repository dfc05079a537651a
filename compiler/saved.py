"""Files of results that survive an interruption; small ones are replaced in one step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alloc_moe.compiler.errors import OutputError


def save_text(text: str, path: Path, *, what: str) -> None:
    """Replace the file in one step, so that an interruption leaves the old one or the new one.

    Args:
        text: All of its content.
        path: Where to; its folder must exist.
        what: What it holds, for the message: ``The profile``.

    Raises:
        OutputError: It can't be written there.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"{what} can't be saved as {path}: {error.strerror}. Choose another path."
        ) from error


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
