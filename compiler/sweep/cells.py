"""Every method at every budget, every way at every target: made, run on held-out text, counted."""

from __future__ import annotations

import contextlib
import datetime
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alloc_moe.compiler.calibration.windows import CalibrationSet, calibrate
from alloc_moe.compiler.errors import SweepError
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.package.versions import versions
from alloc_moe.compiler.planning.allocation import parse_budget
from alloc_moe.compiler.planning.plan import make_planned
from alloc_moe.compiler.records import CalibrationOptions, PlanOptions
from alloc_moe.compiler.sweep.budgets import FULL, BudgetJobs
from alloc_moe.compiler.sweep.held_out import read_held_out
from alloc_moe.compiler.sweep.jobs import Job
from alloc_moe.compiler.sweep.kept import KeptCells, make_folder
from alloc_moe.compiler.sweep.methods import Method
from alloc_moe.compiler.sweep.models import FLOAT32, Models, StoredModel, WeightType
from alloc_moe.compiler.sweep.records import (
    CalibrationText,
    Cell,
    ScoredText,
    SweepResults,
)
from alloc_moe.compiler.sweep.running import CELL, FULL_LOGITS, HeldOutRuns
from alloc_moe.compiler.sweep.targets import TargetJobs, ladder
from alloc_moe.compiler.sweep.ways import Way
from alloc_moe.compiler.workspace.folders import held
from alloc_moe.runtime.measure.bench import machine

if TYPE_CHECKING:
    import onnx_ir as ir

    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.runtime.console import Console


@dataclass(frozen=True)
class SweepOptions:
    """What the user asked `alloc-sweep` for.

    ``weights`` are those of budgets; each of the ``ways`` has its own. Without ``targets`` a ladder
    of them is climbed, if there are ways.
    """

    model: str
    folder: Path
    budgets: tuple[str, ...]
    methods: tuple[Method, ...]
    text: Path
    text_tokens: int | None = None
    calibration: str | None = None
    tokens: int = 8192
    seeds: tuple[int, ...] = (0,)
    weights: WeightType = FLOAT32
    targets: tuple[float, ...] = ()
    ways: tuple[Way, ...] = ()
    threads: int | None = None
    trust_remote_code: bool = False


def run_sweep(options: SweepOptions, console: Console, *, command: str) -> SweepResults:
    """Return what every method adds to the loss at every budget, and every way at every target.

    Each cell is an artifact that onnxruntime ran. Cells and profiles are kept in the folder as they
    come: a sweep that was interrupted goes on where it was.

    Raises:
        AllocMoeError: Anything that the user can act on.
    """
    moe = _loaded(options, console)
    checkpoint = moe.checkpoint
    texts = [
        calibrate(
            checkpoint, CalibrationOptions(options.calibration, options.tokens, seed), console
        )
        for seed in options.seeds
    ]
    scored = read_held_out(options.text, options.text_tokens, checkpoint.tokenizer)
    if scored.sha256 == texts[0].sha256:
        raise SweepError(
            f"{options.text} is the calibration text itself. Give text to --text that the model "
            "was neither trained nor calibrated on."
        )
    for budget in options.budgets:  # a wrong one is told before hours of work
        parse_budget(budget, [layer.experts_per_token for layer in moe.layers])
    make_folder(options.folder)
    with _work_folder(options.folder) as folder:
        kept = KeptCells(options.folder)
        runs = HeldOutRuns(scored, moe.layers, folder, options.threads, console)
        models = Models(moe, lambda: _loaded(options, console), console)
        shared = models, runs, scored, options.folder, console
        of_budgets = BudgetJobs(checkpoint, options.weights, *shared)
        jobs = list(of_budgets.jobs(options.methods, options.budgets, texts))
        if options.ways:
            targets = options.targets or ladder(checkpoint)
            jobs += TargetJobs(checkpoint, *shared).jobs(options.ways, targets, texts)
        full_key = BudgetJobs(checkpoint, FLOAT32, *shared).key(FULL, "1.0", texts[0])
        if full_key not in kept or any(job.key not in kept for job in jobs):
            console.note("Running the full model")
            planned = {"planned": [layer.experts_per_token for layer in moe.layers]}
            graph = _full_graph(models.of(FLOAT32, texts[0]), texts[0], console)
            kept.keep(full_key, {**runs.run_full(graph), **planned})
        _measure(jobs, kept, console)
        full = kept[full_key]
        assert full is not None
    return SweepResults(
        options.model,
        moe.config.model_type,
        layers=tuple(layer.name for layer in moe.layers),
        experts=tuple(layer.num_experts for layer in moe.layers),
        experts_per_token=tuple(layer.experts_per_token for layer in moe.layers),
        full_loss=full["loss"],
        text=ScoredText(scored.name, scored.sha256, len(scored.ids) - 1),
        calibration=CalibrationText(
            Path(texts[0].name).name, texts[0].sha256, texts[0].tokens, options.seeds
        ),
        machine={"processor": machine()},
        versions=versions(),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        command=command,
        sensitivities=of_budgets.sensitivities(
            options.methods if options.budgets else (), texts[0]
        ),
        cells=_cells(jobs, kept, full["loss"]),
    )


def _loaded(options: SweepOptions, console: Console) -> MoeModel:
    return load_model(options.model, console, trust_remote_code=options.trust_remote_code)


def _full_graph(model: StoredModel, text: CalibrationSet, console: Console) -> ir.Model:
    """Return the graph that runs every expert in float32."""
    moe = model.moe
    budget = parse_budget("1.0", [layer.experts_per_token for layer in moe.layers])
    options = PlanOptions("none", "keep", "none", dial=False)
    planned = make_planned(moe, text, budget, options, profile=None, console=console)
    return specialize(model.graph(moe), planned.plan, device="cpu")


@contextlib.contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder of what is run, which no other sweep has: what a kill left in it is gone."""
    with held(folder / ".work", f"Another sweep is writing {folder}") as work:
        try:
            _clear(work.path)
            yield work.path
        finally:
            _clear(work.path)


def _clear(work: Path) -> None:
    for left in work.glob(f"{CELL}*"):
        shutil.rmtree(left, ignore_errors=True)
    (work / FULL_LOGITS).unlink(missing_ok=True)


def _measure(jobs: Sequence[Job], kept: KeptCells, console: Console) -> None:
    """Measure the cells that aren't kept, and keep each as it comes."""
    todo = [job for job in jobs if job.key not in kept]
    if not todo:
        return
    done = len(jobs) - len(todo)
    with console.progress("Sweeping", len(jobs), unit="cells", done=done) as progress:
        for job in todo:
            console.note(job.name)
            kept.keep(job.key, job.measure())
            progress.advance()


def _cells(jobs: Sequence[Job], kept: KeptCells, full: float) -> tuple[Cell, ...]:
    """Return the cells that were measured, without those that there is no plan for.

    Raises:
        SweepError: There is a plan for none of them.
    """
    found = [(job, kept[job.key]) for job in jobs]
    cells = tuple(job.cell(measured, full) for job, measured in found if measured is not None)
    if not cells and jobs:
        raise SweepError(
            "No way has a plan that reads as little as --targets says. Give larger ones, or auto."
        )
    return cells
