"""Small files of results that are replaced in one step."""

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


def check_format(data: Mapping[str, Any], supported: int) -> None:
    """Raise ValueError unless the file's content is of the format that this version reads."""
    if data["format"] != supported:
        raise ValueError(f"format {data['format']}, this version reads {supported}")
