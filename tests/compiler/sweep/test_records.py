"""Results of a sweep on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

from alloc_moe.compiler.errors import SweepError
from alloc_moe.compiler.sweep.records import SweepResults

FILE = Path("sweep.json")


def test_results_survive_json(synthetic_sweep: ModuleType) -> None:
    results = synthetic_sweep.synthetic_sweep(seeds=(0, 1), layers=3)
    again = SweepResults.from_json(results.to_json(), path=FILE)
    assert again == results
    assert hash(again.cells) == hash(results.cells)  # tuples all the way down


def test_results_without_cells_survive_json(synthetic_sweep: ModuleType) -> None:
    results = synthetic_sweep.synthetic_sweep(methods=(), sensitivities=())
    assert SweepResults.from_json(results.to_json(), path=FILE) == results


def test_a_loss_that_is_not_finite_is_null_and_comes_back_as_nan(
    synthetic_sweep: ModuleType,
) -> None:
    results = synthetic_sweep.synthetic_sweep()
    cell = dataclasses.replace(results.cells[0], loss=math.inf, added_loss=math.nan)
    written = dataclasses.replace(results, cells=(cell,)).to_json()
    assert json.loads(written)["cells"][0]["loss"] is None
    [again] = SweepResults.from_json(written, path=FILE).cells
    assert math.isnan(again.loss)
    assert math.isnan(again.added_loss)
    assert again.activations == cell.activations


def test_decoding_that_was_not_measured_stays_so(synthetic_sweep: ModuleType) -> None:
    results = synthetic_sweep.synthetic_sweep(decode=False)
    again = SweepResults.from_json(results.to_json(), path=FILE)
    assert {cell.loss_decode for cell in again.cells} == {None}


def test_full_activations_are_those_of_all_layers(synthetic_sweep: ModuleType) -> None:
    assert synthetic_sweep.synthetic_sweep(layers=5, k=4).full_activations == 20


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "null"])
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(SweepError, match=r"sweep\.json holds no results of a sweep"):
        SweepResults.from_json(text, path=FILE)


def test_another_format_is_refused(synthetic_sweep: ModuleType) -> None:
    data = json.loads(synthetic_sweep.synthetic_sweep().to_json()) | {"format": 7}
    with pytest.raises(SweepError, match="format 7, expected 1"):
        SweepResults.from_json(json.dumps(data), path=FILE)


def test_an_unknown_field_is_refused(synthetic_sweep: ModuleType) -> None:
    data = json.loads(synthetic_sweep.synthetic_sweep().to_json())
    data["cells"][0]["colour"] = "red"
    with pytest.raises(SweepError, match="colour"):
        SweepResults.from_json(json.dumps(data), path=FILE)
