"""Model and text -> the plans that alloc-compile makes by default, for scripts that score them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.errors import TokenSizesError
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.planning.allocation import parse_budget
from alloc_moe.compiler.planning.plan import expert_sizes, make_planned
from alloc_moe.compiler.records import CorrectionMode, Planned, PlanOptions
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.compiler.sensitivity.token_sizes.fitting import fit_token_sizes
from alloc_moe.runtime.artifact.token_sizes import TokenSizes
from alloc_moe.runtime.console import Console

QUIET = Console(quiet=True)


def default_plans(
    moe: MoeModel,
    text: CalibrationSet,
    budgets: Sequence[str],
    *,
    correction: CorrectionMode = "affine",
) -> Iterator[Planned]:
    """Yield the default's plan of each budget: one price, token sizes, and a correction.

    As in a compile, there are no token sizes where the text is too short for them.
    """
    profile = measure_sensitivity(
        moe, text, metric="fisher", redistribution="price", correction=correction, console=QUIET
    )
    sizes = expert_sizes("price", profile, moe)
    assert sizes is not None
    token_sizes: tuple[TokenSizes, ...] | None
    try:
        token_sizes = fit_token_sizes(moe, text, sizes, QUIET)
    except TokenSizesError:
        token_sizes = None
    trained = [layer.experts_per_token for layer in moe.layers]
    for budget in budgets:
        yield make_planned(
            moe,
            text,
            parse_budget(budget, trained),
            PlanOptions(dial=False, correction=correction),
            profile=profile,
            console=QUIET,
            token_sizes=token_sizes,
        )
