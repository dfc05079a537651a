"""Options that commands of the compiler share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, get_args

import click

from alloc_moe.compiler.records import (
    CorrectionMode,
    Metric,
    OffloadMode,
    Redistribution,
    Rounding,
)
from alloc_moe.runtime.commands.numeric import MOST_TEXT, WholeFrom, seed_type


def profiling_options(
    threshold_where: str,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options that both commands take, and where ``threshold`` is the default redistribution."""
    return functools.partial(_add_profiling_options, threshold_where=threshold_where)


def _add_profiling_options(
    function: Callable[..., Any], *, threshold_where: str
) -> Callable[..., Any]:
    options = (
        click.option(
            "--calibration",
            metavar="FILE_OR_DATASET",
            help="Text to calibrate on, or conversations (.jsonl). Default: calibration.txt beside "
            "the model, else a built-in text.",
        ),
        click.option(
            "--tokens",
            type=WholeFrom(2, MOST_TEXT),
            default=8192,
            show_default=True,
            help="Calibration tokens.",
        ),
        click.option(
            "--seed",
            type=seed_type,
            default=0,
            show_default=True,
            help="Picks the windows of calibration text.",
        ),
        click.option(
            "--sensitivity",
            type=click.Choice(get_args(Metric)),
            default="fisher",
            show_default=True,
            help="What fewer experts in a layer cost: the divergence from the full model as "
            "estimated in one pass with gradients (fisher), or as measured (kl); the paper's "
            "suffix perplexity; the change of the layer's output, on the text or on noise.",
        ),
        click.option(
            "--redistribute",
            type=click.Choice(get_args(Redistribution)),
            help="Which of a token's experts run. One price for all layers and tokens; a threshold "
            "per layer; tokens compete within the call (batch) or the sequence; plain top-k "
            "(none); cumulative weight (top-p), or weight relative to the best expert's (ratio). "
            "Default: price; threshold where experts' sizes aren't measured (--sensitivity kl, "
            f"ppl-suffix, data-free){threshold_where}.",
        ),
        click.option(
            "--correct",
            type=click.Choice(get_args(CorrectionMode)),
            default="affine",
            show_default=True,
            help="Change the experts' weights to make up for those that don't run: by a factor per "
            "dimension and a shift per expert, or by one factor per layer. Sensitivities are "
            "measured with that.",
        ),
        click.option(
            "--offload",
            type=click.Choice(get_args(OffloadMode)),
            default="auto",
            show_default=True,
            help="Read each decoder layer from disk when it runs, instead of holding the whole "
            "model in memory; auto: if it may not fit.",
        ),
        click.option(
            "--trust-remote-code", is_flag=True, help="Run Python code of the checkpoint."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def rounding_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --block and --rounding."""
    block = click.option(
        "--block",
        type=click.Choice(["16", "32", "64", "128"]),
        default="128",
        show_default=True,
        help="For int8 and int4: how many weights share a scale at most; in embeddings and head "
        "64 at most. More is faster, less is more exact.",
    )
    rounding = click.option(
        "--rounding",
        type=click.Choice(get_args(Rounding)),
        help="For int8 and int4: round each weight to the nearest value, or let weights make up "
        "for each other's errors on the calibration text (gptq). Default: gptq for int4, nearest "
        "for int8.",
    )
    return block(rounding(function))


@contextlib.contextmanager
def wrong_options() -> Iterator[None]:
    """Turn an OptionsError into click's, with exit code 2."""
    from alloc_moe.compiler.errors import OptionsError

    try:
        yield
    except OptionsError as error:
        raise click.UsageError(str(error)) from error
