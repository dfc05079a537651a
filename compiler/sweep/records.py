"""What a sweep measured, as plain data and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from alloc_moe.compiler.errors import SweepError

FORMAT = 1


@dataclass(frozen=True)
class ScoredText:
    """The held-out text that losses were measured on; ``tokens`` were scored."""

    name: str
    sha256: str
    tokens: int


@dataclass(frozen=True)
class CalibrationText:
    """The text that plans were made from; each seed chose ``tokens`` tokens of it."""

    name: str
    sha256: str
    tokens: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Sensitivity:
    """What fewer experts cost each layer: ``costs[l][k - 1]`` for k experts in MoE layer l.

    They were measured under the redistribution and with the correction.
    """

    metric: str
    redistribution: str
    costs: tuple[tuple[float, ...], ...]
    seconds: float
    correction: str = "none"


@dataclass(frozen=True)
class Cell:
    """One method at one budget with one calibration seed.

    ``budget`` is the fraction asked for; ``activations`` is the mean number of experts that a
    token really ran, over all layers. ``experts_per_token_histogram[l][n]`` is the fraction of
    tokens that ran n experts in layer l. Losses are nats per token; ``loss_decode`` is measured
    with one token per call, where it was measured. A loss that is not finite is NaN.
    """

    method: str
    budget: float
    _: KW_ONLY
    seed: int
    allocation: str
    redistribution: str
    correction: str
    loss: float
    added_loss: float
    activations: float
    activations_per_layer: tuple[float, ...]
    planned_per_layer: tuple[float, ...]
    experts_per_token_histogram: tuple[tuple[float, ...], ...]
    loss_decode: float | None = None
    default: bool = False


@dataclass(frozen=True)
class SweepResults:
    """Everything a sweep measured, and how; tuples without a name run over the MoE layers."""

    model: str
    family: str
    _: KW_ONLY
    layers: tuple[str, ...]
    experts: tuple[int, ...]
    experts_per_token: tuple[int, ...]
    full_loss: float
    text: ScoredText
    calibration: CalibrationText
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    date: str
    command: str
    sensitivities: tuple[Sensitivity, ...]
    cells: tuple[Cell, ...]

    @property
    def full_activations(self) -> int:
        """Experts that a token activates in the full model, over all layers."""
        return sum(self.experts_per_token)

    def to_json(self) -> str:
        """Return the results as one JSON object; numbers that are not finite become null."""
        data = _without_nan({"format": FORMAT, **dataclasses.asdict(self)})
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, *, path: Path) -> SweepResults:
        """Read back what `to_json` wrote.

        Raises:
            SweepError: The text holds no results of a sweep.
        """
        try:
            return _results(json.loads(text))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SweepError(
                f"{path} holds no results of a sweep ({error!r}). Give a sweep.json that "
                "alloc-sweep wrote, or make it again."
            ) from error


def _results(data: dict[str, Any]) -> SweepResults:
    version = data.pop("format")
    if version != FORMAT:
        raise ValueError(f"format {version}, expected {FORMAT}")
    calibration = data.pop("calibration")
    sensitivities, cells = data.pop("sensitivities"), data.pop("cells")
    return SweepResults(
        layers=tuple(data.pop("layers")),
        experts=tuple(data.pop("experts")),
        experts_per_token=tuple(data.pop("experts_per_token")),
        text=ScoredText(**data.pop("text")),
        calibration=CalibrationText(**{**calibration, "seeds": tuple(calibration["seeds"])}),
        full_loss=_number(data.pop("full_loss")),
        sensitivities=tuple(
            Sensitivity(**{**item, "costs": _rows(item["costs"])}) for item in sensitivities
        ),
        cells=tuple(_cell(item) for item in cells),
        **data,
    )


def _cell(item: dict[str, Any]) -> Cell:
    return Cell(
        **{
            **item,
            **{name: _number(item[name]) for name in ("loss", "added_loss", "activations")},
            "activations_per_layer": _row(item["activations_per_layer"]),
            "planned_per_layer": _row(item["planned_per_layer"]),
            "experts_per_token_histogram": _rows(item["experts_per_token_histogram"]),
        }
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _row(values: list[float | None]) -> tuple[float, ...]:
    return tuple(_number(value) for value in values)


def _rows(rows: list[list[float | None]]) -> tuple[tuple[float, ...], ...]:
    return tuple(_row(row) for row in rows)


def _without_nan(value: Any) -> Any:  # any JSON value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value
