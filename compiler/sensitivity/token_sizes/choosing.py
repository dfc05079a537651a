"""Options, budget and model -> whether tokens get sizes of their own, and what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alloc_moe.compiler.choices import have_sizes_in_nats
from alloc_moe.compiler.errors import TokenSizesError
from alloc_moe.compiler.sensitivity.token_sizes.kept import fit_once

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import CompileOptions
    from alloc_moe.runtime.artifact.plan import Budget
    from alloc_moe.runtime.artifact.token_sizes import TokenSizes
    from alloc_moe.runtime.console import Console

NEEDLESS = "would decide nothing: under the --cap every expert runs, or one in each layer"
"""Why there are none where neither a score nor a dial has anything to choose."""
NO_ROOM = "take bytes that --target-bytes leaves no room for"
"""Why there are none where a plan fits without their maps only."""
_MOST_WEIGHTS = 20_000_000  # in all layers: they are text in the plan


def wants_token_sizes(
    options: CompileOptions, budget: Budget, moe: MoeModel, console: Console
) -> bool:
    """Return whether tokens get sizes of their own: as asked, else wherever they can.

    Where a limit of this compiler forbids what is not asked for, that is told.

    Args:
        options: What was asked for.
        budget: What for; at the full one sizes are for the dial, which a cap leaves out.
        moe: The model.
        console: Where it is told.

    Raises:
        TokenSizesError: They are asked for, and a model of this size has none.
    """
    if options.token_sizes is False or not have_sizes_in_nats(options.plan, options.sensitivity):
        return False
    full = options.goal is None and budget.activations == budget.original
    if full and options.plan.cap is not None:
        if options.token_sizes:
            leave_out(NEEDLESS, console)
        return False
    if options.token_sizes:
        check_room(moe)
        return True
    try:
        _check_time(moe)
        check_room(moe)
    except TokenSizesError as error:
        leave_out(error.reason, console)
        return False
    return True


def fit_if_possible(
    options: CompileOptions,
    moe: MoeModel,
    calibration: CalibrationSet,
    sizes: Sequence[Sequence[float]],
    path: Path,
    console: Console,
) -> tuple[TokenSizes, ...] | None:
    """Return what is fitted or kept at `path`; None, and why, if nothing can be and nobody asked.

    Raises:
        TokenSizesError: Nothing can be fitted, and it was asked for.
        ProfileError: What is kept can't be read, or is damaged.
    """
    try:
        return fit_once(moe, calibration, sizes, path, console)
    except TokenSizesError as error:
        if options.token_sizes:
            raise
        leave_out(error.reason, console)
        return None


def _check_time(moe: MoeModel) -> None:
    """Raise TokenSizesError where they take too long to be fitted unless they are asked for."""
    if moe.offloading is not None:
        raise TokenSizesError(
            "take several times as long as the profile where layers are read as they run, and "
            "nobody asked for them (--token-sizes)"
        )


def leave_out(reason: str, console: Console) -> None:
    """Tell that there are none, and why: the end of a sentence on "they"."""
    console.note(f"Token sizes are left out: they {reason}")


def check_room(moe: MoeModel) -> None:
    """Raise TokenSizesError if a model has no token sizes, for its size."""
    hidden = moe.config.get_text_config().hidden_size
    weights = sum(layer.num_experts * (hidden + 1) for layer in moe.layers)
    if weights > _MOST_WEIGHTS:
        raise TokenSizesError(
            f"would put {weights} numbers into the plan, more than {_MOST_WEIGHTS}"
        )
