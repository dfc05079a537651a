"""A sweep's results as CSV, read back too, and as Markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

from alloc_moe.compiler.errors import SweepError
from alloc_moe.compiler.sweep.records import SweepResults
from alloc_moe.compiler.sweep.report.data import Digest
from alloc_moe.compiler.sweep.report.tables import COLUMNS, from_csv, markdown_table, to_csv

FILE = Path("sweep.csv")


@pytest.fixture(scope="module")
def results(synthetic_sweep: ModuleType) -> SweepResults:
    made: SweepResults = synthetic_sweep.synthetic_sweep()
    return made


# to_csv


def test_csv_holds_every_cell_with_all_its_digits(results: SweepResults) -> None:
    cell = results.cells[0]
    rows = list(csv.DictReader(io.StringIO(to_csv(results))))
    assert len(rows) == len(results.cells)
    assert tuple(rows[0]) == COLUMNS
    assert rows[0]["added_loss"] == repr(cell.added_loss)
    assert rows[0]["activations_per_layer"] == " ".join(map(repr, cell.activations_per_layer))
    histogram = "|".join(" ".join(map(repr, row)) for row in cell.experts_per_token_histogram)
    assert rows[0]["experts_per_token_histogram"] == histogram
    assert {row["full_activations"] for row in rows} == {"48"}
    assert {row["default"] for row in rows if row["method"] == "uniform k"} == {"no"}


def test_csv_quotes_labels(results: SweepResults) -> None:
    cell = dataclasses.replace(results.cells[0], method='a, "b"\nc')
    [row] = csv.DictReader(io.StringIO(to_csv(dataclasses.replace(results, cells=(cell,)))))
    assert row["method"] == 'a, "b"\nc'


# from_csv


@pytest.mark.parametrize("decode", [True, False])
def test_cells_survive_csv(synthetic_sweep: ModuleType, decode: bool) -> None:
    results = synthetic_sweep.synthetic_sweep(seeds=(0, 2), decode=decode)
    again = from_csv(to_csv(results), model="a/b", path=FILE)
    assert again.cells == results.cells
    assert again.model == "a/b"
    assert again.experts_per_token == results.experts_per_token
    assert again.full_activations == 48
    assert again.full_loss == pytest.approx(results.full_loss, rel=1e-15)
    assert again.calibration.seeds == (0, 2)
    assert (again.text.name, again.sensitivities, dict(again.machine)) == ("", (), {})


def test_losses_that_are_not_finite_survive_csv(results: SweepResults) -> None:
    lost = dataclasses.replace(results.cells[0], loss=math.nan, added_loss=math.nan)
    changed = dataclasses.replace(results, cells=(lost, results.cells[1]))
    again = from_csv(to_csv(changed), model="m", path=FILE)
    assert math.isnan(again.cells[0].added_loss)
    assert again.cells[1] == results.cells[1]
    assert again.full_loss == pytest.approx(results.full_loss, rel=1e-15)


def test_layers_of_different_k_survive_csv(results: SweepResults) -> None:
    rows = results.cells[0].experts_per_token_histogram
    cell = dataclasses.replace(
        results.cells[0], experts_per_token_histogram=(rows[0][:5], *rows[1:])
    )
    again = from_csv(to_csv(dataclasses.replace(results, cells=(cell,))), model="m", path=FILE)
    assert again.experts_per_token == (4, 8, 8, 8, 8, 8)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "no rows"),
        (",".join(COLUMNS), "no rows"),
        ("method,loss\nprice,0.5", "KeyError\\('budget'\\)"),
        (f"{','.join(COLUMNS)}\nprice,no,price,price,none,half", "'half'"),
        (f"{','.join(COLUMNS)}\nprice,no,price,price,none,0.5", "TypeError"),
        (f'{",".join(COLUMNS)}\n"price', "unexpected end of data"),
    ],
)
def test_other_tables_are_refused(content: str, fault: str) -> None:
    with pytest.raises(SweepError, match=f"sweep.csv holds no table of a sweep .*{fault}"):
        from_csv(content, model="m", path=FILE)


# markdown_table


def test_markdown_is_methods_by_budgets(results: SweepResults) -> None:
    heads, rule, *rows = markdown_table(results).splitlines()
    assert heads == "|  | 0.25 | 0.375 | 0.5 | 0.625 | 0.75 |"
    assert rule.count("---:") == 5
    assert [row.split(" | ")[0] for row in rows] == [
        f"| {method}" for method in Digest(results).methods
    ]
    number = r"(\*\*)?[+-]0\.\d{4} ±0\.\d{4}\1 \(\d+\.\d\)".replace(r"\1", r"(\*\*)?")
    for row in rows:
        assert re.fullmatch(rf"\| [^|]+ (\| {number} ){{5}}\|", row)
    assert sum(row.count("**") for row in rows) == 2 * 5


def test_markdown_of_one_seed_has_no_spread(synthetic_sweep: ModuleType) -> None:
    table = markdown_table(synthetic_sweep.synthetic_sweep(seeds=(3,)))
    assert "±" not in table


def test_markdown_escapes_labels(results: SweepResults) -> None:
    cell = dataclasses.replace(results.cells[0], method="a|b *c*\n`d`")
    table = markdown_table(dataclasses.replace(results, cells=(cell,)))
    assert table.splitlines()[2].startswith(r"| a\|b \*c\* \`d\` |")
