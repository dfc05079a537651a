"""A sweep of ways to spend bytes: its plans are those of a compile, and none is made twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from alloc_moe.compiler.commands.alloc_compile import compile_command
from alloc_moe.compiler.commands.alloc_sweep import sweep_command
from alloc_moe.compiler.errors import SweepError
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.sweep import models, running, targets
from alloc_moe.compiler.sweep.held_out import read_held_out
from alloc_moe.compiler.sweep.models import WeightType
from alloc_moe.compiler.sweep.records import Cell, SweepResults
from alloc_moe.compiler.sweep.report.tables import from_csv
from alloc_moe.compiler.sweep.targets import ladder
from alloc_moe.compiler.sweep.ways import WAYS, parse_ways
from alloc_moe.runtime.artifact.files import find_artifact
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.measure.evaluate import default_window, evaluate_artifact

TEXT = "few of the experts are chosen; a router of the layer is enough for them. " * 3
SMALL, LARGE = 75_000, 125_000  # less than all experts in int4; all of them, but not in int8
SIZES = f"{SMALL},{LARGE / 1000:g}KB"


def swept(model: Path, folder: Path, *options: object) -> Result:
    text = folder.parent / "heldout.txt"
    text.write_text(TEXT)
    given = [model, "--text", text, "--tokens", 256, "-o", folder, "--threads", 1, *options]
    return CliRunner().invoke(sweep_command, list(map(str, given)))


@pytest.fixture(scope="module")
def plans() -> dict[tuple[str, float], AllocationPlan]:
    """The plans that the sweep made, by what was asked for: filled by it."""
    return {}


@pytest.fixture(scope="module")
def folder(
    checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    plans: dict[tuple[str, float], AllocationPlan],
) -> Path:
    """The folder of a sweep of all ways that is done."""
    folder = tmp_path_factory.mktemp("sweep") / "results"
    planned = targets.TargetJobs._planned

    def spy(self: targets.TargetJobs, target: Any, options: Any, *given: Any) -> Any:
        made = planned(self, target, options, *given)
        if not target.k:
            weights, way = options.target, options.plan.redistribution
            said = weights.dtype, weights.mixed_bits, way, options.token_sizes
            plans[json.dumps(said), target.most] = made[1].plan
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets.TargetJobs, "_planned", spy)
        outcome = swept(checkpoint("olmoe"), folder, "--targets", SIZES)
    assert outcome.exit_code == 0, outcome.stderr
    assert "Sweeping: " in outcome.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> SweepResults:
    return SweepResults.from_json((folder / "sweep.json").read_text(), path=folder)


def cells(results: SweepResults, way: str) -> dict[float, Cell]:
    found = (cell for cell in results.cells if cell.method == WAYS[way].name)
    return {cell.target_bytes: cell for cell in found if cell.target_bytes is not None}


def test_every_way_has_a_cell_per_target_that_it_has_a_plan_for(
    folder: Path, results: SweepResults
) -> None:
    for name, way in WAYS.items():
        found = cells(results, name)
        if way.plain:
            assert [max(cell.planned_per_layer) for cell in found.values()] == (
                [1, 2, 3, 4] if way.weights.dtype == "int4" else [1, 2]
            )
            continue
        small = [] if way.weights.dtype == "int8" else [SMALL]
        assert list(found) == [*small, LARGE], name
        assert {cell.dtype for cell in found.values()} == {way.weights.dtype}
    assert {path.name for path in folder.iterdir()} >= {"frontier.svg", "report.html", "sweep.csv"}
    assert not (folder / "chart.svg").exists()  # there are no budgets


def test_what_is_read_is_counted_from_what_ran(results: SweepResults) -> None:
    for cell in results.cells:
        assert cell.target_bytes is not None
        assert cell.planned_bytes is not None
        assert cell.read_bytes is not None
        assert cell.planned_bytes <= cell.target_bytes
        more = cell.activations - sum(cell.planned_per_layer)
        assert cell.read_bytes == pytest.approx(cell.planned_bytes, rel=0.1)
        # An expert of 4 bits without a shift, of 8 bits with one.
        nbytes = sorted((more * 3840, more * 7168))
        assert nbytes[0] - 1 <= cell.read_bytes - cell.planned_bytes <= nbytes[1] + 1
        assert cell.divergence is not None
        assert cell.divergence > 0
        assert cell.seconds is not None
        assert cell.added_loss == cell.loss - results.full_loss


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if not way.plain])
def test_the_plan_of_a_target_is_that_of_a_compile(
    checkpoint: Callable[[str], Path],
    moe_model: Callable[[str], MoeModel],
    folder: Path,
    results: SweepResults,
    plans: dict[tuple[str, float], AllocationPlan],
    tmp_path: Path,
    name: str,
) -> None:
    way, output = WAYS[name], tmp_path / "out.onnx"
    large = way.weights.dtype == "int8" or way.weights.mixed_bits  # the second of one graph
    most = LARGE if large else SMALL
    given = ["--tokens", "256", "--target-bytes", str(most), *way.flags.split()]
    arguments = [str(checkpoint("olmoe")), "-q", "-o", str(output), *given]
    outcome = CliRunner().invoke(compile_command, arguments)
    assert outcome.exit_code == 0, outcome.stderr
    plan, cell = find_artifact(output).plan, cells(results, name)[most]
    weights = way.weights
    said = weights.dtype, weights.mixed_bits, way.redistribution, way.token_sizes
    made = plans[json.dumps(said), most]
    assert (plan.layers, plan.budget, plan.target) == (made.layers, made.budget, made.target)
    assert (plan.price, plan.overlap) == (made.price, made.overlap)
    assert cell.planned_per_layer == tuple(layer.k for layer in plan.layers)
    assert cell.bits_per_layer == tuple(plan.quantization["expert_bits"])
    assert cell.planned_bytes is not None
    assert round(cell.planned_bytes) == plan.target["bytes"]
    session = open_session(output, ep="cpu", threads=1)
    tokenizer = moe_model("olmoe").checkpoint.tokenizer
    ids = read_held_out(folder.parent / "heldout.txt", None, tokenizer).ids
    window = default_window(session.context_length)
    found = evaluate_artifact(session, ids, window=window, stride=window - 64)
    assert found.loss == pytest.approx(cell.loss, rel=1e-6)


@pytest.mark.slow
def test_a_plain_k_is_that_of_a_compile(
    checkpoint: Callable[[str], Path], results: SweepResults, tmp_path: Path
) -> None:
    cell = list(cells(results, "int4-k").values())[1]
    output = tmp_path / "out.onnx"
    arguments = [str(checkpoint("olmoe")), "-q", "-o", str(output), "--budget", "6"]
    given = ["--tokens", "256", *WAYS["int4-k"].flags.split()]
    outcome = CliRunner().invoke(compile_command, [*arguments, *given])
    assert outcome.exit_code == 0, outcome.stderr
    plan = find_artifact(output).plan
    assert tuple(layer.k for layer in plan.layers) == cell.planned_per_layer == (2, 2, 2)
    assert cell.activations_per_layer == (2, 2, 2)
    assert cell.read_bytes == cell.planned_bytes == cell.target_bytes
    assert tuple(plan.quantization["expert_bits"]) == cell.bits_per_layer == (4, 4, 4)


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("It was measured before.")


def test_a_second_sweep_measures_nothing_and_writes_the_same(
    checkpoint: Callable[[str], Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for module, name in (
        (models, "export_model"),
        (models, "round_model"),
        (targets, "measure_sensitivity"),
        (running, "evaluate_artifact"),
    ):
        monkeypatch.setattr(module, name, refuse)
    outcome = swept(checkpoint("olmoe"), folder, "--targets", SIZES)
    assert outcome.exit_code == 0, outcome.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_sweep_that_was_interrupted_rounds_only_what_it_lacks(
    checkpoint: Callable[[str], Path],
    folder: Path,
    results: SweepResults,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unfinished = tmp_path / "results"
    unfinished.mkdir()
    kept = json.loads((folder / "cells.json").read_text())
    last = next(key for key, found in reversed(kept.items()) if found and "int8-nearest" in key)
    lost = kept.pop(last)
    (unfinished / "cells.json").write_text(json.dumps(kept))
    round_model, rounded = models.round_model, []

    def count(moe: MoeModel, *given: Any, **options: Any) -> MoeModel:
        rounded.append(given[0] and given[0].dtype)
        return round_model(moe, *given, **options)

    monkeypatch.setattr(models, "round_model", count)
    outcome = swept(checkpoint("olmoe"), unfinished, "--targets", SIZES)
    assert outcome.exit_code == 0, outcome.stderr
    assert rounded == [None, "int8"]  # the full model, whose logits are needed again
    again = json.loads((unfinished / "cells.json").read_text())[last]
    assert again["loss"] == pytest.approx(lost["loss"], rel=1e-6)
    assert again["planned"] == lost["planned"]


def test_a_table_holds_the_cells(folder: Path, results: SweepResults) -> None:
    table = folder / "sweep.csv"
    again = from_csv(table.read_text("utf-8"), model=results.model, path=table)
    assert again.cells == results.cells


def test_seeds_repeat_what_depends_on_them(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    given = ("--targets", "150KB", "--ways", "int8-k,int4-k", "--seeds", "0,1")
    outcome = swept(checkpoint("olmoe"), tmp_path / "results", *given, "--text-tokens", 60)
    assert outcome.exit_code == 0, outcome.stderr
    path = tmp_path / "results" / "sweep.json"
    found = SweepResults.from_json(path.read_text(), path=path)
    assert [(cell.method, cell.seed) for cell in found.cells] == [
        *[("int4, uniform k", 0)] * 4,
        *[("int4, uniform k", 1)] * 4,
        *[("int8, uniform k", 0)] * 3,  # rounded to the nearest, without a text
    ]


def test_budgets_are_swept_in_a_type(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    given = ("--budgets", "0.5", "--plans", "uniform,price+affine", "--text-tokens", 60)
    types = ("--dtype", "int4", "--rounding", "nearest")
    outcome = swept(checkpoint("olmoe"), tmp_path / "results", *given, *types)
    assert outcome.exit_code == 0, outcome.stderr
    path = tmp_path / "results" / "sweep.json"
    found = SweepResults.from_json(path.read_text(), path=path)
    assert [cell.dtype for cell in found.cells] == ["int4", "int4"]
    assert {cell.bits_per_layer for cell in found.cells} == {(4, 4, 4)}
    assert "--dtype int4 --rounding nearest" in found.command
    assert found.cells[0].planned_bytes == 47556 + 6 * 3840
    assert found.sensitivities


def test_the_ladder_has_a_plan_on_each_rung(moe_model: Callable[[str], MoeModel]) -> None:
    checkpoint = moe_model("olmoe").checkpoint
    rungs = ladder(checkpoint)
    least, most = (WeightType(dtype).reading(checkpoint) for dtype in ("int4", "int8"))
    assert len(rungs) == 8
    assert rungs[0] >= least.others + float(least.costs(shifted=True).cheapest) > 0.99 * rungs[0]
    assert rungs[-1] >= most.original > 0.99 * rungs[-1]
    assert list(rungs) == sorted(rungs)


def test_the_command_and_the_page_name_all_ways() -> None:
    [ways] = (option for option in sweep_command.params if option.name == "ways")
    assert f"[default: {','.join(WAYS)}]" in (ways.help or "")
    page = (Path(__file__).parents[3] / "compiler" / "README.md").read_text("utf-8")
    assert [name for name in WAYS if f"`{name}`" not in page] == []


def test_ways_are_named_as_the_command_takes_them() -> None:
    assert parse_ways(["mixed-int8", "int4-k"]) == (WAYS["int4-k"], WAYS["mixed-int8"])
    with pytest.raises(SweepError, match=r"'int4-prise' is no way to spend bytes\. Did you mean"):
        parse_ways(["int4-prise"])


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        (("--targets", "much"), 2, "--targets is 'much'. Give a number of bytes such as"),
        (("--targets", "1MB", "--ways", "int3"), 1, "'int3' is no way to spend bytes."),
        (("--targets", "1MB", "--dtype", "int4"), 2, "--dtype and --rounding are for --budgets"),
        (("--ways", "int4-k"), 2, "--ways are for --targets: give these too"),
        (("--rounding", "gptq"), 2, "--rounding gptq needs --dtype int4 or int8"),
    ],
)
def test_what_cant_be_done_is_told_before_any_work(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    options: tuple[str, ...],
    code: int,
    expected: str,
) -> None:
    outcome = swept(checkpoint("olmoe"), tmp_path / "results", *options)
    assert outcome.exit_code == code
    assert expected in " ".join(outcome.stderr.split())
    assert not (tmp_path / "results").exists()


def test_targets_below_every_plan_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    given = ("--targets", "50KB", "--text-tokens", 60)
    outcome = swept(checkpoint("olmoe"), tmp_path / "results", *given)
    assert outcome.exit_code == 1
    words = " ".join(outcome.stderr.split())
    assert "No way has a plan that reads as little as --targets says. Give larger ones" in words
