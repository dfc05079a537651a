"""Ways to spend bytes at targets of bytes: the cells to measure, planned as by a compile."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alloc_moe.compiler.errors import BudgetError
from alloc_moe.compiler.planning.allocation import parse_budget
from alloc_moe.compiler.planning.goals.planner import Planner, token_sizes_of
from alloc_moe.compiler.planning.goals.search import meet_goal, reachable, tell_left_out
from alloc_moe.compiler.sensitivity.kept import measured_redistribution
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.compiler.sensitivity.token_sizes.choosing import (
    wants_token_sizes,
)
from alloc_moe.compiler.sweep.jobs import Job, measured, measures
from alloc_moe.compiler.sweep.models import WeightType
from alloc_moe.compiler.sweep.records import Cell

if TYPE_CHECKING:
    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.checkpoint import Checkpoint
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import CompileOptions, Planned, SensitivityProfile
    from alloc_moe.compiler.sweep.held_out import HeldOut
    from alloc_moe.compiler.sweep.kept import Found
    from alloc_moe.compiler.sweep.models import Models, StoredModel
    from alloc_moe.compiler.sweep.running import HeldOutRuns
    from alloc_moe.compiler.sweep.ways import Way
    from alloc_moe.runtime.console import Console

_RUNGS = 8  # of a ladder of targets
_FULL = "1.0"


@dataclass(frozen=True)
class Target:
    """Bytes that a token reads at most; for a plain way what it reads with ``k`` in each layer."""

    most: float
    k: int = 0


def ladder(checkpoint: Checkpoint) -> tuple[float, ...]:
    """Return targets from one expert in each layer in int4 to all experts in int8, evenly."""
    least, most = (WeightType(dtype).reading(checkpoint) for dtype in ("int4", "int8"))
    low = least.always + float(least.costs(shifted=True).cheapest)
    steps = [low + (most.original - low) * rung / (_RUNGS - 1) for rung in range(_RUNGS)]
    return tuple(map(_rounded_up, steps))


def _rounded_up(nbytes: float) -> float:
    """Return the next number of three digits."""
    step = 10.0 ** (math.floor(math.log10(nbytes)) - 2)
    return math.ceil(nbytes / step) * step


class TargetJobs:
    """The cells of ways and targets; rounding and profile of a type are made once for a text."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        models: Models,
        runs: HeldOutRuns,
        scored: HeldOut,
        folder: Path,
        console: Console,
    ) -> None:
        self._checkpoint, self._models, self._runs = checkpoint, models, runs
        self._scored, self._folder, self._console = scored, folder, console
        self._profile: tuple[Path, SensitivityProfile] | None = None
        self._ran: tuple[str, Found] | None = None

    @property
    def _most(self) -> list[int]:
        return [layer.experts_per_token for layer in self._checkpoint.layers]

    def jobs(
        self, ways: Sequence[Way], targets: Sequence[float], texts: Sequence[CalibrationSet]
    ) -> Iterator[Job]:
        """Yield the cells, those of one type and text together, so that it is rounded once."""
        for weights in dict.fromkeys(way.weights for way in ways):
            for index, text in enumerate(texts):
                for way in ways:
                    if way.weights == weights and (index == 0 or way.goes_by_text):
                        for target in self._targets(way, targets):
                            yield self._job(way, target, text)

    def _targets(self, way: Way, targets: Sequence[float]) -> Iterator[Target]:
        """Yield the targets of a way; for a plain one every k that the largest has room for."""
        if not way.plain:
            yield from map(Target, targets)
            return
        reading = way.weights.reading(self._checkpoint)
        for k in range(1, max(self._most) + 1):
            pairs = zip(reading.experts, self._most, strict=True)
            experts = sum(min(k, most) * widths[0] for widths, most in pairs)
            if reading.always + experts <= max(targets):
                yield Target(reading.always + experts, k)

    def _job(self, way: Way, target: Target, text: CalibrationSet) -> Job:
        def cell(found: Found, full: float) -> Cell:
            return Cell(
                way.name,
                sum(found["planned"]) / sum(self._most),
                seed=text.seed,
                allocation="uniform" if way.plain else "fisher",
                redistribution=way.redistribution,
                correction=way.correction,
                dtype=way.weights.dtype,
                target_bytes=target.most,
                **measures(found, full),
            )

        asked = f"k = {target.k}" if target.k else f"{target.most:.0f} bytes"
        return Job(
            self._key(way, target, text),
            f"{way.name} at {asked}, seed {text.seed}",
            lambda: self._measured(way, target, text),
            cell,
        )

    def _key(self, way: Way, target: Target, text: CalibrationSet) -> str:
        made_of = [text.sha256, text.seed, text.tokens] if way.goes_by_text else []
        said = [way.weights.name, way.redistribution, way.correction, way.plain, way.token_sizes]
        scored = [self._scored.sha256, len(self._scored.ids), self._checkpoint.fingerprint]
        return json.dumps([said, dataclasses.astuple(target), made_of, *scored])

    def _measured(self, way: Way, target: Target, text: CalibrationSet) -> Found | None:
        """Return what a cell measures; None where no plan of the way reads so little."""
        options = way.options(str(self._checkpoint.source), target.most)
        assert options.goal is not None
        try:
            reachable(options.goal, way.weights.reading(self._checkpoint), needs_token_sizes=False)
            model = self._models.of(way.weights, text)
            profiled = None if way.plain else self._profiled(way, model, text)
            start = time.monotonic()
            moe, planned = self._planned(target, options, model, text, profiled)
        except BudgetError as error:
            self._console.note(f"{way.name} has no plan: {error}")
            return None
        plan = dataclasses.replace(planned.plan, target={})
        key = json.dumps([way.name, text.seed, plan.to_json()])
        if self._ran is None or self._ran[0] != key:  # all experts may be within two targets
            self._ran = key, measured(model, self._runs, moe, planned, since=start)
        else:
            model.take_back(moe)
        return self._ran[1]

    def _planned(
        self,
        target: Target,
        options: CompileOptions,
        model: StoredModel,
        text: CalibrationSet,
        profiled: tuple[Path, SensitivityProfile] | None,
    ) -> tuple[MoeModel, Planned]:
        """Return the plan as `alloc-compile` makes it, and the model with the bits it chose."""
        planner = Planner(
            model.moe, text, options.plan, None, model.formats, None, self._console, None
        )
        if profiled is None:
            experts = sum(min(target.k, most) for most in self._most)
            return planner.of_budget(parse_budget(experts, self._most), None)
        assert options.goal is not None
        path, profile = profiled
        wanted = wants_token_sizes(
            options, parse_budget(_FULL, self._most), model.moe, self._console
        )
        asked = model.weights.reading(self._checkpoint, token_sizes=wanted)
        reading = reachable(options.goal, asked, needs_token_sizes=False)
        tell_left_out(options.goal, asked, reading, self._console)
        token_sizes = None
        if reading.token_sizes:
            token_sizes = token_sizes_of(profile, path, options, model.moe, text, self._console)
        if token_sizes is None:
            reading = dataclasses.replace(reading, token_sizes=0)
        planner = dataclasses.replace(planner, profile=profile, token_sizes=token_sizes)
        return meet_goal(options.goal, planner, reading, 0.0)

    def _profiled(
        self, way: Way, model: StoredModel, text: CalibrationSet
    ) -> tuple[Path, SensitivityProfile]:
        """Return the sensitivities of a type under a redistribution, and the file they are in."""
        policy = measured_redistribution(way.redistribution)
        path = self._folder / f"profile-{way.weights.name}-{policy}-{text.seed}.json"
        if self._profile is None or self._profile[0] != path:
            profile = measure_sensitivity(
                model.moe,
                text,
                metric="fisher",
                redistribution=way.redistribution,
                correction=way.correction,
                formats=model.formats,
                path=path,
                console=self._console,
            )
            self._profile = path, profile
        return self._profile
