"""What ``--refine`` measures: the divergence of whole plans on the calibration text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alloc_moe.compiler.planning.allocation import profiled_costs
from alloc_moe.compiler.planning.divergence import Divergence
from alloc_moe.compiler.planning.exchanges import Plan, RefineReport, refine, search
from alloc_moe.compiler.planning.thresholds import Setting

if TYPE_CHECKING:
    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.planning.costs import CostTable
    from alloc_moe.compiler.records import SensitivityProfile
    from alloc_moe.runtime.console import Console

_STEPS_PER_OCTAVE = 4  # of a layer's factor
_MIDDLE, _STEPS = 8, 16


@dataclass(frozen=True)
class Refinement:
    """How plans are refined: from the ``starts`` best, within ``seconds``, kept at ``path``."""

    starts: int
    seconds: float
    seed: int
    path: Path


def refine_allocation(
    moe: MoeModel,
    calibration: CalibrationSet,
    setting: Setting,
    refinement: Refinement,
    *,
    profile: SensitivityProfile,
    activations: int,
    limit: float | None,
    costs: CostTable | None,
    first: Sequence[int],
    console: Console,
) -> tuple[list[int], RefineReport]:
    """Return the k per layer that diverges least from the full model, as far as was searched.

    Args:
        moe: The model.
        calibration: The text; each window is a call.
        setting: What else runs: a redistribution that takes a k per layer.
        refinement: How far to search.
        profile: The additive costs, whose best plans are measured first.
        activations: The budget.
        limit: With ``costs``: the most they may add up to.
        costs: What experts use up, where that isn't activations; then only ``first`` is a start.
        first: The plan that is best by sums.
        console: Where progress is told.
    """
    divergence = Divergence(moe, calibration)

    def evaluate(plan: Plan) -> float:
        return divergence.of_allocation(plan, setting)

    rows = profiled_costs(profile, moe.layers)
    fingerprint = _fingerprint(moe, calibration, setting, rows, activations)
    if costs is None:
        return refine(
            rows,
            activations,
            evaluate,
            refinement.starts,
            seconds=refinement.seconds,
            seed=refinement.seed,
            cache_path=refinement.path,
            fingerprint=fingerprint,
            console=console,
        )
    table, most = costs, math.inf if limit is None else limit
    return search(
        [tuple(first)],
        [layer.experts_per_token for layer in moe.layers],
        evaluate,
        allowed=lambda plan: float(table.total(plan)) <= most,
        seconds=refinement.seconds,
        seed=refinement.seed,
        cache_path=refinement.path,
        fingerprint=fingerprint,
        console=console,
    )


def refine_sizes(
    moe: MoeModel,
    calibration: CalibrationSet,
    setting: Setting,
    refinement: Refinement,
    *,
    activations: float,
    console: Console,
) -> tuple[tuple[tuple[float, ...], ...], RefineReport]:
    """Return expert sizes whose layers are weighed better against each other, for ``price``.

    A layer's sizes are multiplied by powers of the fourth root of 2; as only ratios matter, one
    layer's step up is another's step down. Each choice is measured at the price that meets the
    budget.
    """
    assert setting.sizes is not None
    sizes = setting.sizes
    divergence = Divergence(moe, calibration)

    def weighed(steps: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        factors = [2 ** ((step - _MIDDLE) / _STEPS_PER_OCTAVE) for step in steps]
        return tuple(
            tuple(float(f"{size * factor:.6g}") for size in row)
            for row, factor in zip(sizes, factors, strict=True)
        )

    def evaluate(steps: Plan) -> float:
        tried = dataclasses.replace(setting, sizes=weighed(steps))
        return divergence.of_price(tried, activations)

    steps, report = search(
        [(_MIDDLE,) * len(moe.layers)],
        [_STEPS] * len(moe.layers),
        evaluate,
        seconds=refinement.seconds,
        seed=refinement.seed,
        cache_path=refinement.path,
        fingerprint=_fingerprint(moe, calibration, setting, sizes, activations),
        console=console,
    )
    return weighed(steps), report


def _fingerprint(
    moe: MoeModel,
    calibration: CalibrationSet,
    setting: Setting,
    values: object,
    activations: float,
) -> str:
    """Of all that a measurement depends on."""
    parts = [
        moe.fingerprint,
        calibration.sha256,
        calibration.seed,
        calibration.tokens,
        setting.redistribution,
        setting.weights,
        setting.overlap,
        values,
        activations,
        *(dataclasses.asdict(given) for given in setting.token_sizes or ()),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
