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
from alloc_moe.runtime.artifact.shapes import (
    ShapeError,
    boolean,
    load_json,
    mapping,
    measured,
    number,
    optional,
    record,
    rows,
    string,
    whole,
)

FORMAT = 1
_LARGEST = 700.0  # loss whose exponential is a float


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
    """One method at one budget, or at one target of bytes, with one calibration seed.

    ``budget`` is the fraction asked for; ``activations`` is the mean number of experts that a
    token really ran, over all layers. ``experts_per_token_histogram[l][n]`` is the fraction of
    tokens that ran n experts in layer l. Losses are nats per token; ``loss_decode`` is measured
    with one token per call, where it was measured. A loss that is not finite is NaN.

    With ``target_bytes``, what a token shall read of all weights in decode at most, the budget is
    the fraction that the plan says. ``planned_bytes`` is what it reads by the plan, so on the
    calibration text, ``read_bytes`` with the experts that the scored text ran. ``divergence`` is
    KL(full model || this), nats per scored token. ``dtype`` is the type of the weights,
    ``bits_per_layer`` that of each layer's experts. ``seconds`` are those that planning, writing
    and running it took. Cells of earlier versions lack what is None, or empty.
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
    dtype: str = "float32"
    target_bytes: float | None = None
    planned_bytes: float | None = None
    read_bytes: float | None = None
    divergence: float | None = None
    bits_per_layer: tuple[int, ...] = ()
    seconds: float | None = None

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that overflows."""
        return math.inf if self.loss > _LARGEST else math.exp(self.loss)


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

    @property
    def of_budgets(self) -> SweepResults:
        """The same with the cells that have no target of bytes."""
        cells = tuple(cell for cell in self.cells if cell.target_bytes is None)
        return dataclasses.replace(self, cells=cells)

    @property
    def of_targets(self) -> SweepResults:
        """The same with the cells that have one."""
        cells = tuple(cell for cell in self.cells if cell.target_bytes is not None)
        return dataclasses.replace(self, cells=cells)

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
            raw = load_json(text)
            version = record({"format": whole()})(raw, "")["format"]
            return _results(raw, version)
        except ShapeError as error:
            raise SweepError(
                f"{path} holds no results of a sweep ({error}). Give a sweep.json that "
                "alloc-sweep wrote, or make it again."
            ) from error


def _number_or_null(value: Any, where: str) -> float:
    """Take a number, or null for one that was not finite."""
    return math.nan if value is None else float(measured(value, where))


_BYTES = ("target_bytes", "planned_bytes", "read_bytes")
_ROW = rows(_number_or_null)
_CELL = record(
    {
        "method": string(),
        "budget": number(0),
        "seed": whole(),
        "allocation": string(),
        "redistribution": string(),
        "correction": string(),
        "loss": _number_or_null,
        "added_loss": _number_or_null,
        "activations": _number_or_null,
        "activations_per_layer": _ROW,
        "planned_per_layer": _ROW,
        "experts_per_token_histogram": rows(_ROW),
    },
    {
        "loss_decode": optional(measured),
        "default": boolean,
        "dtype": string(),
        **dict.fromkeys(_BYTES, optional(number(0))),
        "divergence": optional(measured),
        "bits_per_layer": rows(whole(1, 64)),
        "seconds": optional(measured),
    },
    closed=True,
)
_SENSITIVITY = record(
    {
        "metric": string(),
        "redistribution": string(),
        "costs": rows(_ROW),
        "seconds": measured,
    },
    {"correction": string()},
    closed=True,
)
_TEXT = {"name": string(), "sha256": string(), "tokens": whole(0)}
_RESULTS = record(
    {
        "format": whole(),
        "model": string(),
        "family": string(),
        "layers": rows(string()),
        "experts": rows(whole(1)),
        "experts_per_token": rows(whole(1)),
        "full_loss": _number_or_null,
        "text": record(_TEXT, closed=True),
        "calibration": record({**_TEXT, "seeds": rows(whole())}, closed=True),
        "machine": mapping(string()),
        "versions": mapping(string()),
        "date": string(),
        "command": string(),
        "sensitivities": rows(_SENSITIVITY),
        "cells": rows(_CELL),
    },
    closed=True,
)


def _results(raw: Any, version: int) -> SweepResults:
    if version != FORMAT:
        raise ShapeError(f"format {version}, expected {FORMAT}")
    data = _RESULTS(raw, "")
    data.pop("format")
    return SweepResults(
        **{
            **data,
            "text": ScoredText(**data["text"]),
            "calibration": CalibrationText(**data["calibration"]),
            "sensitivities": tuple(Sensitivity(**item) for item in data["sensitivities"]),
            "cells": tuple(Cell(**item) for item in data["cells"]),
        }
    )


def _without_nan(value: Any) -> Any:  # any JSON value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value
