"""Files of results that survive an interruption; small ones are replaced in one step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

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


def save_tensors(tensors: Sequence[torch.Tensor], path: Path, *, what: str, then: str) -> None:
    """Replace a file of tensors in one step.

    Args:
        tensors: In their order.
        path: Where to; its folder is made.
        what: What they are, for the message.
        then: What helps if there is no space, for the message: ``choose another path``.

    Raises:
        OutputError: They can't be written there.
    """
    # Processes that work together may save the same.
    partial = path.with_suffix(f".{os.environ.get('RANK', '0')}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        save_file({str(i): tensor.contiguous() for i, tensor in enumerate(tensors)}, partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{what} can't be saved as {path}: {error}. Free some space, or {then}."
        ) from error


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
