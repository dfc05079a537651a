"""What commands of the compiler share: options, what excludes what, what must be installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

SCORED = ("price", "threshold", "top-p", "ratio")
"""Redistributions that compare scores, so that a cap is of use to them."""

WITHOUT_ALLOCATION = ("price", "top-p", "ratio")
"""Redistributions that divide the budget among layers themselves."""

SIZED = ("fisher", "output")
"""Metrics that measure the sizes of experts."""


def block_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --block."""
    return click.option(
        "--block",
        type=click.Choice(["16", "32", "64", "128"]),
        default="128",
        show_default=True,
        help="For int8 and int4: how many weights share a scale at most; in embeddings and head "
        "64 at most. More is faster, less is more exact.",
    )(function)


def price_needs_sizes(sensitivity: str) -> str:
    """Say that a metric has no sizes for ``price``."""
    return (
        f"--redistribute price goes by the sizes of experts, which --sensitivity {sensitivity} "
        f"doesn't measure. Use {' or '.join(SIZED)}, or another --redistribute."
    )


def check_mixed_bits(
    *, dtype: str, cost: str | None, allocation: str, sensitivity: str, redistribution: str | None
) -> None:
    """Refuse what --mixed-bits can't be combined with.

    Raises:
        UsageError: It was.
    """
    for fault, advice in (
        (dtype not in ("int8", "int4"), "needs --dtype int4 or int8"),
        (cost not in (None, "bytes"), f"budgets bytes, so --cost {cost} can't be met"),
        (allocation == "uniform", "goes by sensitivities, which --allocation uniform ignores"),
        (
            sensitivity not in SIZED,
            f"needs --sensitivity {' or '.join(SIZED)}; {sensitivity} doesn't measure the "
            "rounding of weights",
        ),
        (
            redistribution in WITHOUT_ALLOCATION,
            f"divides a budget among layers, which {redistribution} does by itself. Use "
            "--redistribute threshold, batch, sequence or none",
        ),
    ):
        if fault:
            raise click.UsageError(f"--mixed-bits {advice}.")


def need_compile_extra() -> None:
    """Raise an AllocMoeError that names what the base install lacks for compiling."""
    import importlib.util

    missing = [
        name
        for name in (
            "torch",
            "transformers",
            "onnx",
            "onnx_ir",
            "onnxscript",
            "accelerate",
            "scipy",
        )
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        from alloc_moe.compiler.errors import AllocMoeError

        raise AllocMoeError(
            f"Compiling needs {', '.join(missing)}, which the base install leaves out. "
            "Install alloc-moe[compile]."
        )
