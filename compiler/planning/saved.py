"""What was measured for plans and is saved beside the profile: latencies, losses of plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alloc_moe.compiler.errors import CostError, ProfileError
from alloc_moe.compiler.workspace.files import check_format
from alloc_moe.runtime.artifact.shapes import (
    anything,
    mapping,
    number,
    read_json,
    record,
    rows,
    whole,
)

FORMAT = 1


def _latency(value: Any, where: str) -> dict[str, Any]:
    """Take a measurement, with whatever says what it is of."""
    fields: dict[str, Any] = mapping(anything)(value, where)
    fields.update(_TIMES(value, where))
    return fields


_NUMBERS = rows(number(0))
_TIMES = record({"milliseconds": _NUMBERS, "spread": _NUMBERS})
_LATENCIES = record({"format": whole(), "measurements": rows(_latency)})
_LOSSES = record({"format": whole(), "losses": mapping(mapping(number()))})


def read_latencies(path: Path | None) -> list[dict[str, Any]]:
    """Return the latencies that a file holds; none if there is no file yet.

    Raises:
        CostError: It can't be read.
    """
    if path is None or not path.exists():
        return []
    try:
        data = read_json(path, _LATENCIES)
        check_format(data, FORMAT)
    except (OSError, ValueError) as error:
        raise CostError(
            f"{path} holds no latencies ({error}). Delete it to measure them again."
        ) from error
    return list(data["measurements"])


def read_losses(path: Path | None) -> dict[str, dict[str, float]]:
    """Return the losses of plans that a file holds; none if there is no file yet.

    Raises:
        ProfileError: It can't be read.
    """
    if path is None or not path.exists():
        return {}
    try:
        data = read_json(path, _LOSSES)
        check_format(data, FORMAT)
    except (OSError, ValueError) as error:
        raise ProfileError(
            f"{path} holds no measured losses ({error}). Delete it to measure them again."
        ) from error
    found: dict[str, dict[str, float]] = data["losses"]
    return found
