"""What options can be, alone and together: checked before anything is loaded."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from alloc_moe.compiler.errors import OptionsError
from alloc_moe.compiler.records import (
    COMMON,
    SCORED,
    SIZED,
    Allocation,
    CacheType,
    CompileOptions,
    CorrectionMode,
    CostKind,
    Device,
    DType,
    Form,
    Goal,
    Metric,
    OffloadMode,
    PlanOptions,
    PricePer,
    Redistribution,
    Rounding,
    TargetOptions,
    Weights,
)
from alloc_moe.runtime.artifact.files import is_nameable

UNMEASURED: tuple[Redistribution, ...] = ("top-p", "ratio")
"""Redistributions that go by no profile: nothing is measured for them."""

MOST_TEXT = 1 << 40
"""The most tokens of a text."""
MOST_SEED = 2**63 - 1
_MOST_BYTES = 1e18
_BYTES = re.compile(
    r"(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18}) ?([KMGT]?)(B?)", re.ASCII | re.IGNORECASE
)
_IN_NATS: tuple[Metric, ...] = ("fisher", "kl")


def budget_text(budget: Any) -> str:  # whatever a user gives
    """Return a budget as the command takes it: with a point it is a fraction.

    Raises:
        OptionsError: It is no finite number.
    """
    if isinstance(budget, str):
        return budget
    number = _scalar(budget)
    if isinstance(number, numbers.Integral):
        return str(int(number))
    if not isinstance(number, numbers.Real) or not math.isfinite(number):
        raise OptionsError(
            f"The budget {budget!r} is no number. Give a fraction such as 0.5, or a whole number."
        )
    # As it is written: 0.7 in 32 bits is a little less, which would round down to less.
    return np.format_float_positional(
        number if isinstance(number, np.floating) else np.float64(number), trim="0"
    )


def whole(option: str, value: Any, least: int = 0, most: int = MOST_SEED) -> int:
    """Return a whole number in a range, of Python's kind.

    Raises:
        OptionsError: It is none.
    """
    number = _scalar(value)
    if isinstance(number, str) and number.isdecimal():  # a choice of the command line
        number = int(number)
    if not isinstance(number, numbers.Integral) or not least <= int(number) <= most:
        raise OptionsError(f"{option} is {value!r}. Give a whole number from {least} to {most}.")
    return int(number)


def finite(option: str, value: Any, least: float, most: float, *, above: bool = False) -> float:
    """Return a finite number in a range, of Python's kind; `above` leaves out the least.

    Raises:
        OptionsError: It is none.
    """
    number = _scalar(value)
    try:
        real = float(number) if isinstance(number, numbers.Real) else math.nan
    except OverflowError:  # of Python's whole numbers, which have no end
        raise OptionsError(f"{option} is too large a number. Give one up to {most:g}.") from None
    if not least <= real <= most or (above and real == least):
        start = f"above {least:g} and up" if above else f"from {least:g}"
        raise OptionsError(f"{option} is {value!r}. Give a number {start} to {most:g}.")
    return real


def _scalar(value: Any) -> Any:
    """Return the number in an array without dimensions; True and False are no numbers."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    return None if isinstance(value, bool | np.bool_) else value


def path_text(option: str, path: str | Path) -> str:
    """Return a path as text.

    Raises:
        OptionsError: No file can have that name.
    """
    if not is_nameable(path):
        raise OptionsError(f"{option} is {str(path)!r:.200}, which no file can be called.")
    return str(path)


def check_names(options: CompileOptions, sensitivity: str, offload: str) -> None:
    """Raise OptionsError for a choice that there isn't."""
    plan, target = options.plan, options.target
    for name, value, choices in (
        ("--sensitivity", sensitivity, get_args(Metric)),
        ("--redistribute", plan.redistribution, get_args(Redistribution)),
        ("--correct", plan.correction, get_args(CorrectionMode)),
        ("--weights", plan.weights, get_args(Weights)),
        ("--allocation", plan.allocation, get_args(Allocation)),
        ("--cost", plan.cost, get_args(CostKind)),
        ("--dtype", target.dtype, get_args(DType)),
        ("--block", target.block, (16, 32, 64, 128)),
        ("--rounding", target.rounding, get_args(Rounding)),
        ("--cache", target.cache, get_args(CacheType)),
        ("--device", target.device, get_args(Device)),
        ("--price-per", target.price_per, get_args(PricePer)),
        ("--target", target.form, (None, *get_args(Form))),
        ("--offload", offload, get_args(OffloadMode)),
    ):
        check_choice(name, value, choices)


def check_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise OptionsError unless an option's value is one of its choices."""
    if value in choices:
        return
    names = [str(choice) for choice in choices if choice is not None]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(names)}."
    raise OptionsError(f"{option} can't be {value!r}. {hint}")


def check_onnx_only(target: TargetOptions, dtypes: Sequence[str], otherwise: str) -> None:
    """Raise OptionsError for what there is in ONNX artifacts only.

    Args:
        target: What was asked for.
        dtypes: What else weights can be.
        otherwise: What is written instead and what to do, as the end of the message.
    """
    for wrong, what in (
        (target.dtype not in dtypes, f"--dtype {target.dtype}"),
        (target.cache != "float32", f"--cache {target.cache}"),
        (target.device != "cpu", f"--device {target.device}"),
        (target.mixed_bits, "--mixed-bits"),
        (target.block != type(target).block, f"--block {target.block}"),
        (target.price_per != "call", f"--price-per {target.price_per}"),
    ):
        if wrong:
            raise OptionsError(f"{what} is for ONNX artifacts; {otherwise}")


def have_sizes(allocation: Allocation, sensitivity: Metric) -> bool:
    """Whether experts have sizes for ``price`` to go by: measured, or all the same."""
    return sensitivity in SIZED or allocation == "uniform"


def check_plan(plan: PlanOptions, sensitivity: Metric) -> None:
    """Raise OptionsError for options of the plan that exclude each other, or the metric."""
    policy = plan.redistribution
    if policy == "price" and not have_sizes(plan.allocation, sensitivity):
        raise OptionsError(
            f"--redistribute price goes by the sizes of experts, which --sensitivity {sensitivity} "
            f"doesn't measure. Use {' or '.join(SIZED)}, or another --redistribute."
        )
    if plan.cap is not None and policy not in SCORED:
        raise OptionsError(f"--cap is for {', '.join(SCORED)}; {policy} is exact.")
    if plan.cost != "activations" and policy in COMMON:
        raise OptionsError(
            f"--cost {plan.cost} divides a budget among layers, which {policy} does by itself. Use "
            "--redistribute threshold, batch, sequence or none."
        )
    if plan.refine and policy in UNMEASURED:
        raise OptionsError(f"--redistribute {policy} leaves nothing to refine.")


def have_sizes_in_nats(plan: PlanOptions, sensitivity: Metric) -> bool:
    """Whether experts have sizes in nats, which a token could have its own of."""
    return not _against_token_sizes(plan, sensitivity)


def check_token_sizes(options: CompileOptions) -> None:
    """Raise OptionsError if token sizes are asked for where tokens can't have them."""
    if not options.token_sizes:
        return
    for advice in _against_token_sizes(options.plan, options.sensitivity):
        raise OptionsError(f"--token-sizes needs {advice}.")


def _against_token_sizes(plan: PlanOptions, sensitivity: Metric) -> list[str]:
    """Return what would have to be chosen instead, so that experts have sizes in nats."""
    choices = (
        (sensitivity != "fisher", f"--sensitivity fisher, not {sensitivity}"),
        (plan.cost != "activations", "a budget of activations: leave out --cost and --mixed-bits"),
        (plan.redistribution != "price", f"--redistribute price, not {plan.redistribution}"),
        (plan.allocation != "sensitivity", f"--allocation sensitivity, not {plan.allocation}"),
    )
    return [advice for fault, advice in choices if fault]


def check_price_per(target: TargetOptions, plan: PlanOptions) -> None:
    """Raise OptionsError if an artifact can't have a price of each sequence that is asked for."""
    if target.price_per == "call":
        return
    if plan.redistribution != "price" or plan.cap is not None:
        raise OptionsError(
            f"--price-per {target.price_per} needs a price to set: --redistribute price, no --cap."
        )


def check_cache(target: TargetOptions) -> None:
    """Raise OptionsError if an artifact can't have the cache that is asked for."""
    halves = target.dtype in ("float16", "bfloat16")
    if target.cache == "int8" and (target.device == "cuda" or halves):
        raise OptionsError("--cache int8 is for --device cpu and 32-bit activations.")


def chosen_goal(target_bytes: Any, target_loss: Any, budget: Any) -> Goal | None:
    """Return what is asked for instead of a budget, if anything is.

    Raises:
        OptionsError: More than one of the three is, or a target is no number.
    """
    given = [budget, target_bytes, target_loss]
    if sum(each is not None for each in given) > 1:
        raise OptionsError(
            "Give one of --budget, --target-bytes and --target-loss: each decides how many experts "
            "run."
        )
    if target_bytes is not None:
        return Goal("bytes", byte_count("--target-bytes", target_bytes))
    if target_loss is not None:
        return Goal("loss", finite("--target-loss", target_loss, 0, 1e3, above=True))
    return None


def byte_count(option: str, value: Any) -> float:
    """Return a number of bytes; KB, MB and GB are powers of 1000, K, M and G of 1024.

    Raises:
        OptionsError: It is none.
    """
    if not isinstance(value, str):
        return finite(option, value, 1, _MOST_BYTES)
    found = _BYTES.fullmatch(value.strip())
    if found is None:
        raise OptionsError(
            f"{option} is {value!r}. Give a number of bytes such as 1500000, 1500KB or 1.5MB "
            "(powers of 1000), or 1.5M (of 1024)."
        )
    number, unit, ending = found.groups()
    base = 1000 if ending.upper() == "B" else 1024
    return finite(
        option, float(number) * base ** " KMGT".index(unit.upper() or " "), 1, _MOST_BYTES
    )


def check_goal(goal: Goal | None, plan: PlanOptions, cost: str | None, sensitivity: str) -> None:
    """Raise OptionsError for options that a plan for a goal can't go by.

    Args:
        goal: What is asked for, if anything is.
        plan: How it is to be met.
        cost: The --cost that was given, None if none was.
        sensitivity: The metric.
    """
    if goal is None:
        return
    name, by_loss = f"--target-{goal.kind}", goal.kind == "loss"
    for fault, advice in (
        (cost is not None, "goes by bytes that a token reads, so leave out --cost"),
        (plan.cost_batch != 1, "is of one token, so leave out --cost-batch"),
        (plan.refine > 0, "chooses the plan by itself, so leave out --refine"),
        (
            by_loss and plan.redistribution in UNMEASURED,
            f"predicts what plans cost, which {plan.redistribution} doesn't tell. Use "
            "--redistribute price, threshold, batch, sequence or none",
        ),
        (
            by_loss and plan.allocation == "uniform",
            "goes by sensitivities, which --allocation uniform ignores",
        ),
        (
            by_loss and sensitivity not in _IN_NATS,
            f"needs --sensitivity {' or '.join(_IN_NATS)}; {sensitivity} isn't in nats",
        ),
    ):
        if fault:
            raise OptionsError(f"{name} {advice}.")


def chosen_rounding(rounding: Rounding | None, dtype: str, *, mixed_bits: bool = False) -> Rounding:
    """Return how weights are rounded; None is what is better for the type.

    Raises:
        OptionsError: Nothing of that type is rounded so.
    """
    if rounding != "gptq":
        return rounding or ("gptq" if dtype == "int4" or mixed_bits else "nearest")
    if dtype not in ("int8", "int4"):
        raise OptionsError(f"--rounding gptq needs --dtype int4 or int8; {dtype} isn't rounded.")
    return rounding


def check_mixed_bits(
    dtype: str, cost: str | None, allocation: str, sensitivity: str, redistribution: str | None
) -> None:
    """Refuse what --mixed-bits can't be combined with."""
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
            redistribution in COMMON,
            f"divides a budget among layers, which {redistribution} does by itself. Use "
            "--redistribute threshold, batch, sequence or none",
        ),
    ):
        if fault:
            raise OptionsError(f"--mixed-bits {advice}.")
