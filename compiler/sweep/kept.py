"""What a sweep has measured, in a file of its folder: a sweep that was interrupted goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alloc_moe.compiler.errors import OutputError, SweepError
from alloc_moe.compiler.workspace.files import save_text
from alloc_moe.runtime.artifact.shapes import (
    ShapeError,
    mapping,
    measured,
    optional,
    read_json,
    record,
    rows,
    whole,
)

Found = dict[str, Any]
"""What one cell measured, as JSON has it."""

_CELL = record(
    {
        "loss": measured,
        "per_layer": rows(measured),
        "planned": rows(measured),
        "histogram": rows(rows(measured)),
    },
    {
        "divergence": optional(measured),
        "planned_bytes": measured,
        "read_bytes": measured,
        "bits": rows(whole(1, 64)),
        "seconds": measured,
    },
)
_CELLS = mapping(optional(_CELL))


def make_folder(folder: Path) -> None:
    """Make the folder of a sweep, unless an earlier one did.

    Raises:
        OutputError: It can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The folder {folder} can't be written to: {error.strerror}. Give another with -o."
        ) from error


class KeptCells:
    """Cells by all that they depend on; None where there is no plan that reads so little.

    Raises:
        SweepError: The folder has a file that isn't one of a sweep.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "cells.json"
        self._cells = _read(self._path)

    def __contains__(self, key: str) -> bool:
        return key in self._cells

    def __getitem__(self, key: str) -> Found | None:
        return self._cells[key]

    def keep(self, key: str, found: Found | None) -> None:
        """Keep what a cell measured, on disk too."""
        self._cells[key] = found
        save_text(json.dumps(self._cells, indent=0), self._path, what="The results")


def _read(path: Path) -> dict[str, Found | None]:
    """Return what earlier runs measured."""
    if not path.is_file():
        return {}
    try:
        found: dict[str, Found | None] = read_json(path, _CELLS)
    except (OSError, ShapeError) as error:
        raise SweepError(
            f"{path} holds no results of a sweep ({error}). Delete it to measure them again."
        ) from error
    return found
