"""A whole sweep of a small model: every cell an artifact that ran, and none of them twice."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from alloc_moe.compiler.commands.alloc_sweep import sweep_command
from alloc_moe.compiler.sensitivity import measuring as sensitivity
from alloc_moe.compiler.sweep import budgets, models, running
from alloc_moe.compiler.sweep.methods import DEFAULT
from alloc_moe.compiler.sweep.records import Cell, SweepResults
from alloc_moe.compiler.sweep.report.picture import draw_picture
from alloc_moe.compiler.sweep.report.tables import from_csv
from alloc_moe.compiler.workspace.folders import claim, held

TEXT = "few of the experts are chosen; a router of the layer is enough for them. " * 3
FILES = ("sweep.json", "sweep.csv", "report.html", "chart.svg")


@pytest.fixture(scope="module")
def model(
    checkpoint: Callable[[str], Path], exported: Callable[[str], ir.Model]
) -> Any:  # a generator
    """A checkpoint whose export was done before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "export_model", lambda *_, **__: exported("olmoe"))
        yield checkpoint("olmoe")


def swept(model: Path, folder: Path, *options: object, text: Path | None = None) -> Result:
    if text is None:
        text = folder.parent / "heldout.txt"
        text.write_text(TEXT)
    arguments = [model, "--text", text, "--tokens", 256, "-o", folder, *options]
    return CliRunner().invoke(sweep_command, list(map(str, arguments)))


PLANS = ("--budgets", "0.5,0.75", "--plans", "uniform,batch,price+affine,default", "--threads", 1)


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that is done."""
    folder = tmp_path_factory.mktemp("sweep") / "results"
    outcome = swept(model, folder, *PLANS)
    assert outcome.exit_code == 0, outcome.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> SweepResults:
    return SweepResults.from_json((folder / "sweep.json").read_text(), path=folder)


def cells(results: SweepResults, name: str) -> dict[float, Cell]:
    found = {cell.budget: cell for cell in results.cells if cell.method == name}
    assert set(found) == {0.5, 0.75}
    return found


def test_every_plan_is_measured_at_every_budget(folder: Path, results: SweepResults) -> None:
    assert len(results.cells) == 8
    assert (results.family, results.full_activations) == ("olmoe", 12)
    assert results.text.tokens == len(TEXT.encode()) - 1
    assert {path.name for path in folder.iterdir()} == {
        *FILES,
        "cells.json",
        *(path.name for path in folder.glob("profile-*.json")),
    }
    assert {path.name.split("-")[1] for path in folder.glob("profile-*.json")} == {"fisher"}
    assert [cell.default for cell in results.cells].count(True) == 2
    for cell in results.cells:
        assert cell.added_loss == cell.loss - results.full_loss


@pytest.mark.parametrize("name", ["uniform k", "Alloc-T batch, uniform k"])
def test_exact_plans_execute_what_they_say(results: SweepResults, name: str) -> None:
    for budget, cell in cells(results, name).items():
        assert cell.activations_per_layer == cell.planned_per_layer
        assert cell.activations == 12 * budget
    rows = cells(results, "uniform k")[0.5].experts_per_token_histogram
    assert rows == ((0, 0, 1, 0, 0),) * 3


@pytest.mark.parametrize("name", ["price + affine", DEFAULT.name])
def test_a_price_is_within_its_budget_on_the_calibration_text(
    results: SweepResults, name: str
) -> None:
    for budget, cell in cells(results, name).items():
        assert 11.5 * budget < sum(cell.planned_per_layer) <= 12 * budget
        assert cell.activations == pytest.approx(12 * budget, rel=0.25)  # of another text


def test_histograms_are_of_the_activations(results: SweepResults) -> None:
    for cell in results.cells:
        rows = np.array(cell.experts_per_token_histogram)
        assert rows.shape == (3, 5)
        np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-12)
        np.testing.assert_array_equal(rows[:, 0], 0)
        np.testing.assert_allclose(rows @ np.arange(5), cell.activations_per_layer, rtol=1e-9)
        assert sum(cell.activations_per_layer) == pytest.approx(cell.activations)


def test_the_table_holds_every_cell(folder: Path, results: SweepResults) -> None:
    with (folder / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results.cells)
    assert DEFAULT.name in (folder / "report.html").read_text()


def test_the_chart_shows_the_sweep(folder: Path) -> None:
    chart = (folder / "chart.svg").read_text("utf-8")
    names = re.findall(r'class="name">([^<]+)<', chart)
    own = DEFAULT.name.removesuffix(" (default)")
    assert sorted(names) == sorted(["Alloc-T batch, uniform k", "price + affine", own, "uniform k"])
    # The table alone gives the same picture.
    table = folder / "sweep.csv"
    model = re.search("<title[^>]*>([^:]+):", chart)
    assert model
    again = from_csv(table.read_text("utf-8"), model=model[1], path=table)
    assert draw_picture(again) == chart


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("It was measured before.")


def test_a_second_sweep_measures_nothing_and_writes_the_same(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for module, name in (
        (models, "export_model"),
        (budgets, "make_planned"),
        (budgets, "fit_token_sizes"),
        (running, "evaluate_artifact"),
        (sensitivity, "FisherRun"),
    ):
        monkeypatch.setattr(module, name, refuse)
    assert swept(model, folder, *PLANS).exit_code == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_sweep_that_was_interrupted_goes_on(
    model: Path,
    folder: Path,
    results: SweepResults,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unfinished = tmp_path / "results"
    unfinished.mkdir()
    kept = json.loads((folder / "cells.json").read_text())
    first = dict(list(kept.items())[:3])
    (unfinished / "cells.json").write_text(json.dumps(first))
    run, ran = running.HeldOutRuns.run, []

    def count(self: running.HeldOutRuns, graph: ir.Model) -> Any:
        ran.append(graph)
        return run(self, graph)

    monkeypatch.setattr(running.HeldOutRuns, "run", count)
    outcome = swept(model, unfinished, *PLANS)
    assert outcome.exit_code == 0, outcome.stderr
    assert len(ran) == len(kept) - 3 == 6
    again = SweepResults.from_json((unfinished / "sweep.json").read_text(), path=unfinished)
    measured = {"loss": 0.0, "added_loss": 0.0, "divergence": 0.0, "seconds": 0.0}
    for cell, other in zip(results.cells, again.cells, strict=True):
        assert dataclasses.replace(cell, **measured) == dataclasses.replace(other, **measured)
        assert cell.loss == pytest.approx(other.loss, rel=1e-6)
        assert cell.divergence == pytest.approx(other.divergence, rel=1e-4)


def test_a_folder_is_one_sweeps_at_a_time_and_what_a_kill_left_goes(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    work = folder / ".work"
    folder.mkdir()
    plan = ("--budgets", "0.5", "--plans", "price", "--seeds", "1,1", "--threads", 1)
    with held(work, "Held by a test"):
        assert f"Another sweep is writing {folder}." in message(swept(model, folder, *plan))
    claim(work)
    (work / ".cell-killed").mkdir()
    (work / "logits").write_bytes(b"left")
    outcome = swept(model, folder, *plan)
    assert outcome.exit_code == 0, outcome.stderr
    assert not work.exists()
    found = SweepResults.from_json((folder / "sweep.json").read_text(), path=folder)
    assert [cell.seed for cell in found.cells] == [1]


def test_other_text_is_measured_anew(model: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(TEXT.upper())
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cells.json").write_bytes((folder / "cells.json").read_bytes())
    options = ("--budgets", "0.5", "--plans", "uniform", "--text-tokens", 100)
    outcome = swept(model, tmp_path / "results", *options, "--json", text=tmp_path / "other.txt")
    assert outcome.exit_code == 0, outcome.stderr
    wrote = json.loads(outcome.stdout)
    found = SweepResults.from_json(Path(wrote["results"]).read_text(), path=tmp_path)
    assert found.text.tokens == 99
    before = json.loads((folder / "cells.json").read_text())
    after = json.loads((tmp_path / "results" / "cells.json").read_text())
    assert len(after) == len(before) + 2  # the full model and the cell


def test_seeds_repeat_what_depends_on_them(model: Path, tmp_path: Path) -> None:
    options = ("--budgets", "0.5", "--plans", "uniform,uniform+threshold", "--seeds", "0,1")
    outcome = swept(model, tmp_path / "results", *options, "--text-tokens", 60)
    assert outcome.exit_code == 0, outcome.stderr
    found = SweepResults.from_json((tmp_path / "results/sweep.json").read_text(), path=tmp_path)
    assert [(cell.method, cell.seed) for cell in found.cells] == [
        ("uniform k", 0),
        ("uniform + threshold", 0),
        ("uniform + threshold", 1),
    ]


def message(outcome: Result) -> str:
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    return " ".join(outcome.stderr.split())


def test_the_calibration_text_is_no_held_out_text(model: Path, tmp_path: Path) -> None:
    text = model / "calibration.txt"
    outcome = swept(model, tmp_path / "results", "--plans", "uniform", text=text)
    assert outcome.exit_code == 1
    assert "is the calibration text itself" in message(outcome)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        (("--plans", "unifrom"), 1, "'unifrom' is no way to spend a budget. Did you mean uniform"),
        (("--budgets", "half"), 2, "'half' is no budget. Give a fraction with a decimal point"),
        (("--budgets", "0.5,0.1"), 1, "The budget 0.1 of 12 activations per token is 1, too few"),
        (("--seeds", "a,b"), 2, "'a,b' is no list of whole numbers"),
        (("--text", "gone.txt"), 1, "The text gone.txt can't be read"),
    ],
)
def test_what_cant_be_done_is_told_before_any_work(
    model: Path, tmp_path: Path, options: tuple[str, ...], code: int, expected: str
) -> None:
    outcome = swept(model, tmp_path / "results", *options)
    assert outcome.exit_code == code
    assert expected in message(outcome)
    assert not (tmp_path / "results").exists()


def test_kept_cells_that_cant_be_read_are_reported(model: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cells.json").write_text("{")
    outcome = swept(model, tmp_path / "results", "--plans", "uniform")
    assert outcome.exit_code == 1
    assert "cells.json holds no results of a sweep" in message(outcome)


def test_a_folder_that_cant_be_made_is_reported(model: Path, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("mine")
    outcome = swept(model, tmp_path / "results", "--plans", "uniform")
    assert outcome.exit_code == 1
    assert "results can't be written to: File exists" in message(outcome)
