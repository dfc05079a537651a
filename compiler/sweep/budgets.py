"""Methods at budgets of activations, in one type of weights: the cells to measure."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alloc_moe.compiler.errors import ProfileError
from alloc_moe.compiler.planning.allocation import parse_budget
from alloc_moe.compiler.planning.plan import expert_sizes, make_planned
from alloc_moe.compiler.records import (
    CorrectionMode,
    Planned,
    PlanOptions,
    Redistribution,
    SensitivityProfile,
)
from alloc_moe.compiler.sensitivity.corrected import measured_correction
from alloc_moe.compiler.sensitivity.kept import measured_redistribution
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.compiler.sensitivity.token_sizes.fitting import fit_token_sizes
from alloc_moe.compiler.sweep.jobs import Job, measured, measures
from alloc_moe.compiler.sweep.methods import DEFAULT, Method
from alloc_moe.compiler.sweep.models import FLOAT32, WeightType
from alloc_moe.compiler.sweep.records import Cell, Sensitivity

if TYPE_CHECKING:
    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.checkpoint import Checkpoint
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.sweep.held_out import HeldOut
    from alloc_moe.compiler.sweep.kept import Found
    from alloc_moe.compiler.sweep.models import Models
    from alloc_moe.compiler.sweep.running import HeldOutRuns
    from alloc_moe.runtime.artifact.plan import Budget
    from alloc_moe.runtime.artifact.token_sizes import TokenSizes
    from alloc_moe.runtime.console import Console

FULL = Method("full model")


class BudgetJobs:
    """The cells of methods and budgets; what they share is measured once for a text."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: WeightType,
        models: Models,
        runs: HeldOutRuns,
        scored: HeldOut,
        folder: Path,
        console: Console,
    ) -> None:
        self._checkpoint, self._weights, self._models = checkpoint, weights, models
        self._runs, self._scored = runs, scored
        self._folder, self._console = folder, console
        self._token_sizes: dict[int, tuple[TokenSizes, ...]] = {}

    def jobs(
        self, methods: Sequence[Method], budgets: Sequence[str], texts: Sequence[CalibrationSet]
    ) -> Iterator[Job]:
        """Yield the cells; what goes by no calibration text has one for the first only."""
        for index, text in enumerate(texts):
            for method in methods:
                for budget in budgets:
                    if index == 0 or method.calibrated or self._weights.goes_by_text:
                        yield self._job(method, budget, text)

    def sensitivities(
        self, methods: Sequence[Method], text: CalibrationSet
    ) -> tuple[Sensitivity, ...]:
        """Return the profiles that methods were planned with for a text, from their files."""
        paths = dict.fromkeys(self._profile_path(m, text) for m in methods if m.metric)
        found = []
        for path in paths:
            try:
                profile = SensitivityProfile.from_json(path.read_bytes(), path=path)
            except (OSError, ProfileError):  # the cells were measured: they stand without it
                self._console.note(f"Sensitivities of {path} are left out: it can't be read")
                continue
            costs = tuple(row for row in profile.costs if row is not None)
            said = profile.metric, profile.redistribution, costs, profile.seconds
            found.append(Sensitivity(*said, profile.correction))
        return tuple(found)

    def _job(self, method: Method, budget: str, text: CalibrationSet) -> Job:
        experts_per_token = [layer.experts_per_token for layer in self._checkpoint.layers]
        asked = parse_budget(budget, experts_per_token)
        weights = self._weights

        def cell(found: Found, full: float) -> Cell:
            return Cell(
                method.name,
                asked.activations / sum(experts_per_token),
                seed=text.seed,
                allocation=method.metric or "uniform",
                redistribution=method.redistribution,
                correction=method.correction,
                default=dataclasses.replace(method, name=DEFAULT.name) == DEFAULT,
                dtype=weights.dtype,
                **measures(found, full),
            )

        return Job(
            self.key(method, budget, text),
            f"{method.name} at {budget}, seed {text.seed}",
            lambda: self._measured(method, asked, text),
            cell,
        )

    def key(self, method: Method, budget: str, text: CalibrationSet) -> str:
        """Return all that a cell depends on."""
        by_text = method.calibrated or self._weights.goes_by_text
        made_of = [text.sha256, text.seed, text.tokens] if by_text else []
        if (correction := _measured_with(method)) != "none":
            made_of.append(correction)
        said = dataclasses.astuple(dataclasses.replace(method, name=""))
        said = said if method.token_sizes else said[:-1]  # as in folders from before these
        scored = [self._scored.sha256, len(self._scored.ids), self._checkpoint.fingerprint]
        stored = [] if self._weights == FLOAT32 else [self._weights.name]
        return json.dumps([said, budget, made_of, *scored, *stored])

    def _measured(self, method: Method, asked: Budget, text: CalibrationSet) -> Found:
        model = self._models.of(self._weights, text)
        profile = self.profile(model.moe, method, text)
        start = time.monotonic()
        planned = self._planned(model.moe, method, asked, text, profile)
        return measured(model, self._runs, model.moe, planned, since=start)

    def profile(
        self, moe: MoeModel, method: Method, text: CalibrationSet
    ) -> SensitivityProfile | None:
        """Return the sensitivities that a method goes by: from their file, else measured."""
        if method.metric is None:
            return None
        return measure_sensitivity(
            moe,
            text,
            metric=method.metric,
            redistribution=_policy(method),
            correction=_measured_with(method),
            path=self._profile_path(method, text),
            console=self._console,
        )

    def _profile_path(self, method: Method, text: CalibrationSet) -> Path:
        stored = [] if self._weights == FLOAT32 else [self._weights.name]
        parts = (*stored, method.metric, _policy(method), _measured_with(method), text.seed)
        return self._folder / f"profile-{'-'.join(map(str, parts))}.json"

    def _planned(
        self,
        moe: MoeModel,
        method: Method,
        asked: Budget,
        text: CalibrationSet,
        profile: SensitivityProfile | None,
    ) -> Planned:
        return make_planned(
            moe,
            text,
            asked,
            PlanOptions(method.redistribution, "keep", method.correction, dial=False),
            profile=profile,
            token_sizes=self._sizes(moe, text, profile) if method.token_sizes else None,
            console=self._console,
        )

    def _sizes(
        self, moe: MoeModel, text: CalibrationSet, profile: SensitivityProfile | None
    ) -> tuple[TokenSizes, ...]:
        """Return what is fitted to one calibration text: for all budgets."""
        if text.seed not in self._token_sizes:
            sizes = expert_sizes("price", profile, moe)
            assert sizes is not None
            self._token_sizes[text.seed] = fit_token_sizes(moe, text, sizes, self._console)
        return self._token_sizes[text.seed]


def _policy(method: Method) -> Redistribution:
    return measured_redistribution("none" if method.apart else method.redistribution)


def _measured_with(method: Method) -> CorrectionMode:
    """Return the correction that is in place while a method's sensitivities are measured."""
    if method.metric is None or method.apart:
        return "none"
    return measured_correction(method.metric, method.redistribution, method.correction)
