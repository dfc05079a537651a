"""Every method at every budget: compiled, run in onnxruntime on held-out text, and counted."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alloc_moe.compiler.calibration.windows import CalibrationSet, calibrate
from alloc_moe.compiler.errors import OutputError, SweepError
from alloc_moe.compiler.export.normalize import export_model
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.package.versions import versions
from alloc_moe.compiler.planning.allocation import parse_budget
from alloc_moe.compiler.planning.plan import expert_sizes, make_planned
from alloc_moe.compiler.records import (
    CalibrationOptions,
    CorrectionMode,
    Metric,
    Planned,
    PlanOptions,
    Redistribution,
    SensitivityProfile,
)
from alloc_moe.compiler.sensitivity.corrected import measured_correction
from alloc_moe.compiler.sensitivity.kept import measured_redistribution
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.compiler.sensitivity.token_sizes.fitting import fit_token_sizes
from alloc_moe.compiler.sweep.held_out import HeldOut, read_held_out
from alloc_moe.compiler.sweep.methods import DEFAULT, Method
from alloc_moe.compiler.sweep.records import (
    CalibrationText,
    Cell,
    ScoredText,
    Sensitivity,
    SweepResults,
)
from alloc_moe.compiler.workspace.files import save_text, temporary_folder
from alloc_moe.runtime.artifact.shapes import ShapeError, mapping, measured, read_json, record, rows
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.measure.bench import machine
from alloc_moe.runtime.measure.evaluate import default_window, evaluate_artifact

if TYPE_CHECKING:
    import onnx_ir as ir

    from alloc_moe.runtime.artifact.token_sizes import TokenSizes
    from alloc_moe.runtime.console import Console
    from alloc_moe.runtime.execution.calls import Output

_CELLS = mapping(
    record(
        {
            "loss": measured,
            "per_layer": rows(measured),
            "planned": rows(measured),
            "histogram": rows(rows(measured)),
        }
    )
)
_CONTEXT = 64  # tokens that a window shares with the one before


@dataclass(frozen=True)
class SweepOptions:
    """What the user asked `alloc-sweep` for."""

    model: str
    folder: Path
    budgets: tuple[str, ...]
    methods: tuple[Method, ...]
    text: Path
    text_tokens: int | None = None
    calibration: str | None = None
    tokens: int = 8192
    seeds: tuple[int, ...] = (0,)
    threads: int | None = None
    trust_remote_code: bool = False


def run_sweep(options: SweepOptions, console: Console, *, command: str) -> SweepResults:
    """Return what every method adds to the loss at every budget, for every calibration seed.

    Each cell is an artifact that onnxruntime ran. Cells and profiles are kept in the folder as they
    come: a sweep that was interrupted goes on where it was.

    Raises:
        AllocMoeError: Anything that the user can act on.
    """
    moe = load_model(options.model, console, trust_remote_code=options.trust_remote_code)
    texts = [
        calibrate(
            moe.checkpoint, CalibrationOptions(options.calibration, options.tokens, seed), console
        )
        for seed in options.seeds
    ]
    scored = read_held_out(options.text, options.text_tokens, moe.checkpoint.tokenizer)
    if scored.sha256 == texts[0].sha256:
        raise SweepError(
            f"{options.text} is the calibration text itself. Give text to --text that the model "
            "was neither trained nor calibrated on."
        )
    for budget in options.budgets:  # a wrong one is told before hours of work
        parse_budget(budget, [layer.experts_per_token for layer in moe.layers])
    work = _Work(options, console, moe, texts, scored)
    full = work.full_loss()
    cells = [
        work.cell(method, budget, texts[index], full)
        for index in range(len(texts))
        for method in options.methods
        for budget in options.budgets
        if index == 0 or method.calibrated
    ]
    return SweepResults(
        options.model,
        moe.config.model_type,
        layers=tuple(layer.name for layer in moe.layers),
        experts=tuple(layer.num_experts for layer in moe.layers),
        experts_per_token=tuple(layer.experts_per_token for layer in moe.layers),
        full_loss=full,
        text=ScoredText(scored.name, scored.sha256, len(scored.ids) - 1),
        calibration=CalibrationText(
            Path(texts[0].name).name, texts[0].sha256, texts[0].tokens, options.seeds
        ),
        machine={"processor": machine()},
        versions=versions(),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        command=command,
        sensitivities=work.sensitivities(),
        cells=tuple(cells),
    )


def _read_cells(path: Path) -> dict[str, Any]:
    """Return what earlier runs measured, by all that it depends on."""
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = read_json(path, _CELLS)
    except (OSError, ShapeError) as error:
        raise SweepError(
            f"{path} holds no results of a sweep ({error}). Delete it to measure them again."
        ) from error
    return found


class _Work:
    """The model, exported once, and what was measured already."""

    def __init__(
        self,
        options: SweepOptions,
        console: Console,
        moe: MoeModel,
        texts: Sequence[CalibrationSet],
        scored: HeldOut,
    ) -> None:
        self._options, self._console, self._moe, self._scored = options, console, moe, scored
        self._texts = texts
        self._graph: ir.Model | None = None
        self._profiles: dict[
            tuple[Metric, Redistribution, CorrectionMode, int], SensitivityProfile
        ] = {}
        self._token_sizes: dict[int, tuple[TokenSizes, ...]] = {}
        self._kept = options.folder / "cells.json"
        try:
            options.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"The folder {options.folder} can't be written to: {error.strerror}. "
                "Give another with -o."
            ) from error
        self._cells = _read_cells(self._kept)

    def full_loss(self) -> float:
        """Return the loss of the artifact that runs every expert."""
        return float(self._evaluated(Method("full model"), "1.0", self._texts[0])["loss"])

    def cell(self, method: Method, budget: str, text: CalibrationSet, full: float) -> Cell:
        """Return what a method gives at a budget."""
        found = self._evaluated(method, budget, text)
        original = sum(layer.experts_per_token for layer in self._moe.layers)
        requested = parse_budget(budget, [la.experts_per_token for la in self._moe.layers])
        return Cell(
            method.name,
            requested.activations / original,
            seed=text.seed,
            allocation=method.metric or "uniform",
            redistribution=method.redistribution,
            correction=method.correction,
            loss=found["loss"],
            added_loss=found["loss"] - full,
            activations=sum(found["per_layer"]),
            activations_per_layer=tuple(found["per_layer"]),
            planned_per_layer=tuple(found["planned"]),
            experts_per_token_histogram=tuple(tuple(row) for row in found["histogram"]),
            default=dataclasses.replace(method, name=DEFAULT.name) == DEFAULT,
        )

    def sensitivities(self) -> tuple[Sensitivity, ...]:
        """Return the profiles of the first seed."""
        return tuple(
            Sensitivity(
                profile.metric,
                profile.redistribution,
                tuple(row for row in profile.costs if row is not None),
                profile.seconds,
                profile.correction,
            )
            for (*_, seed), profile in self._profiles.items()
            if seed == self._texts[0].seed
        )

    def _evaluated(self, method: Method, budget: str, text: CalibrationSet) -> dict[str, Any]:
        """Return loss, experts and plan of one artifact: remembered, or compiled and run."""
        profile = self._profile(method, text)
        key = self._key(method, budget, text)
        if key not in self._cells:
            self._console.note(f"{method.name} at {budget}, seed {text.seed}")
            planned = self._plan(method, budget, text, profile)
            self._cells[key] = self._run(planned)
            save_text(json.dumps(self._cells, indent=0), self._kept, what="The results")
        found: dict[str, Any] = self._cells[key]
        return found

    def _key(self, method: Method, budget: str, text: CalibrationSet) -> str:
        """Of all that a cell depends on."""
        made_of = [text.sha256, text.seed, text.tokens] if method.calibrated else []
        if (correction := _measured_with(method)) != "none":
            made_of.append(correction)
        said = dataclasses.astuple(dataclasses.replace(method, name=""))
        said = said if method.token_sizes else said[:-1]  # as in folders from before these
        settings = [said, budget, made_of]
        scored = [self._scored.sha256, len(self._scored.ids), self._moe.fingerprint]
        return json.dumps([*settings, *scored])

    def _profile(self, method: Method, text: CalibrationSet) -> SensitivityProfile | None:
        if method.metric is None:
            return None
        policy = measured_redistribution("none" if method.apart else method.redistribution)
        correction = _measured_with(method)
        key = (method.metric, policy, correction, text.seed)
        if key not in self._profiles:
            name = f"profile-{method.metric}-{policy}-{correction}-{text.seed}.json"
            self._profiles[key] = measure_sensitivity(
                self._moe,
                text,
                metric=method.metric,
                redistribution=policy,
                correction=correction,
                path=self._options.folder / name,
                console=self._console,
            )
        return self._profiles[key]

    def _plan(
        self,
        method: Method,
        budget: str,
        text: CalibrationSet,
        profile: SensitivityProfile | None,
    ) -> Planned:
        return make_planned(
            self._moe,
            text,
            parse_budget(budget, [layer.experts_per_token for layer in self._moe.layers]),
            PlanOptions(method.redistribution, "keep", method.correction, dial=False),
            profile=profile,
            token_sizes=self._token_sizes_of(text, profile) if method.token_sizes else None,
            console=self._console,
        )

    def _token_sizes_of(
        self, text: CalibrationSet, profile: SensitivityProfile | None
    ) -> tuple[TokenSizes, ...]:
        """Return what is fitted to one calibration text: for all budgets."""
        if text.seed not in self._token_sizes:
            sizes = expert_sizes("price", profile, self._moe)
            assert sizes is not None
            self._token_sizes[text.seed] = fit_token_sizes(self._moe, text, sizes, self._console)
        return self._token_sizes[text.seed]

    def _run(self, planned: Planned) -> dict[str, Any]:
        """Write the artifact, run it on the held-out text, and delete it."""
        if self._graph is None:
            self._console.note("Exporting the graph")
            self._graph = export_model(self._moe, dtype="float32")
        plan, corrections = planned.plan, planned.corrections
        model = specialize(self._graph, plan, device="cpu", corrections=corrections)
        with temporary_folder(self._options.folder, ".cell-") as folder:
            path = folder / "model.onnx"
            package.save_graph(model, path)
            session = open_session(
                path,
                ep="cpu",
                threads=self._options.threads,
                count_activations=True,
                stop_spinning=True,
            )
            histograms = [
                np.zeros(layer.experts_per_token + 1, np.int64) for layer in self._moe.layers
            ]

            def count(output: Output) -> None:
                assert output.rows is not None
                for histogram, rows in zip(histograms, output.rows, strict=True):
                    histogram += np.bincount(rows, minlength=len(histogram))

            window = default_window(session.context_length)
            found = evaluate_artifact(
                session,
                self._scored.ids,
                window=window,
                stride=max(window - _CONTEXT, 1),
                on_output=count,
            )
            del session  # its mapping of the weights, before the folder goes
        return {
            "loss": found.loss,
            "per_layer": list(found.activations_per_token or ()),
            "planned": [layer.k for layer in plan.layers],
            "histogram": [(counts / counts.sum()).tolist() for counts in histograms],
        }


def _measured_with(method: Method) -> CorrectionMode:
    """Return the correction that is in place while a method's sensitivities are measured."""
    if method.metric is None or method.apart:
        return "none"
    return measured_correction(method.metric, method.redistribution, method.correction)
