"""The matrix of families: the kept figures are whole and good, and can be made again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

LIMIT = 1e-4
"""Of a logit's error."""


@pytest.fixture
def matrix(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks/quality/families")


def failed(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the wrong cells; texts may part at a tie, though not of whole float models."""
    whole = {"dtype": "float32", "policy": "full"}

    def parted(row: Mapping[str, Any]) -> bool:
        return int(row["equal"]) != int(row["tokens"])

    return [
        row
        for row in rows
        if not float(row["error"]) <= LIMIT
        or (parted(row) and not float(row["settled"] or "inf") <= LIMIT)
        or (parted(row) and row.items() >= whole.items())
    ]


@pytest.mark.parametrize(
    ("wrong", "row"),
    [
        (False, {"error": "1e-6", "equal": "192", "settled": ""}),
        (False, {"error": "1e-6", "equal": "191", "settled": "1e-6", "dtype": "int4"}),
        (True, {"error": "nan", "equal": "192", "settled": ""}),
        (True, {"error": "1e-6", "equal": "191", "settled": ""}),
        (True, {"error": "1e-6", "equal": "191", "settled": "2e-3"}),
        (True, {"error": "1e-6", "equal": "191", "settled": "1e-6"}),
    ],
)
def test_texts_may_part_at_ties_only(wrong: bool, row: dict[str, str]) -> None:
    whole = {"family": "olmoe", "dtype": "float32", "policy": "full", "tokens": "192"}
    assert bool(failed([{**whole, **row}])) is wrong


def test_the_kept_matrix_has_every_cell_of_its_families(matrix: ModuleType) -> None:
    kept = matrix.read(matrix.TABLE)
    for family in {row["family"] for row in kept}:
        rows = [row for row in kept if row["family"] == family]
        assert [(row["dtype"], row["policy"]) for row in rows] == [
            (dtype, policy) for dtype in matrix.DTYPES for policy in matrix.POLICIES
        ]
    assert kept
    assert not failed(kept)


@pytest.mark.families
def test_a_family_gives_such_cells_again(
    matrix: ModuleType, checkpoint: Callable[[str], Path], any_family: str
) -> None:
    rows = [asdict(cell) for cell in matrix.cells(checkpoint(any_family), any_family)]
    assert len(rows) == len(matrix.DTYPES) * len(matrix.POLICIES)
    assert not failed(rows)


def test_the_table_has_the_worst_of_a_family(matrix: ModuleType) -> None:
    row = {"family": "olmoe", "dtype": "int4", "cache": "in place", "tokens": "192"}
    rows = [
        {**row, "policy": "none", "error": "1.0e-06", "equal": "191", "settled": "2.0e-06"},
        {**row, "policy": "batch", "error": "9.0e-07", "equal": "192", "settled": ""},
    ]
    assert matrix.table(rows).splitlines()[-1] == (
        "| olmoe | in place |  |  | 1.0e-06 | 1 of 384 | 2.0e-06 |"
    )


def test_families_that_the_file_has_are_not_measured_again(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "families.csv"
    measured = []

    def cells(folder: Path, family: str) -> list[Any]:
        measured.append(family)
        return [
            matrix.Cell(family, dtype, policy, "in place", "0.0e+00", 192, 192)
            for dtype in matrix.DTYPES
            for policy in matrix.POLICIES
        ]

    monkeypatch.setattr(matrix, "cells", cells)
    matrix.measure(["olmoe"], path)
    matrix.measure(["mixtral", "olmoe"], path)
    assert measured == ["olmoe", "mixtral"]
    assert [row["family"] for row in matrix.read(path)[::15]] == ["olmoe", "mixtral"]
