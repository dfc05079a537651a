"""JSON files of a checkpoint: read whole, within bounds, and never from a pipe."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alloc_moe.compiler.errors import CheckpointError

_MAX_BYTES = 100_000_000
_MAX_DEPTH = 60


def regular_size(path: Path) -> int:
    """Return the size of a regular file, or of the one that a link leads to.

    Raises:
        CheckpointError: It is missing, a dangling link, a folder, a pipe or a device.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        what = "is a link to nothing" if path.is_symlink() else "is missing or can't be read"
        raise CheckpointError(f"{path} {what}. Download it again.") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise CheckpointError(f"{path} is {kind}, not a file. Download it again.")
    return status.st_size


def read_json_object(path: Path) -> dict[str, Any]:
    """Return what a JSON file of moderate size and depth holds.

    Raises:
        CheckpointError: It is no regular file, too large, or no JSON object.
    """
    size = regular_size(path)
    if size > _MAX_BYTES:
        raise CheckpointError(
            f"{path} has {size} bytes, more than the {_MAX_BYTES} that are read. It is no file of "
            "a checkpoint: download it again."
        )
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no JSON object that can be read ({short(error)}). Download it again."
        ) from error


def parse_object(data: bytes) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ValueError: It is none, has a key twice or NaN, or is nested too deep.
    """
    try:
        parsed = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant
        )
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"it holds a {type(parsed).__name__}")  # noqa: TRY004, as json's errors
    _check_depth(parsed)
    return parsed


def short(error: BaseException) -> str:
    """Return what an error says in at most 200 printable characters of one line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def shown(value: object) -> str:
    """Return a value as JSON has it, cut to 60 printable characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {shown(twice)} twice")
    return found


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("it holds NaN, which is no number")
    return float(name)  # some configurations say Infinity


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_MAX_DEPTH}")


def _children(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list) else []
