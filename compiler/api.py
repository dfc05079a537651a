"""Compiling and profiling from Python: the commands' options as keywords.

from alloc_moe.compiler import compile

compiled = compile("examples/tiny-moe", budget=0.5, output="out.onnx")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

from alloc_moe.compiler.choices import (
    MOST_SEED,
    MOST_TEXT,
    budget_text,
    check_cache,
    check_choice,
    check_goal,
    check_mixed_bits,
    check_names,
    check_plan,
    check_price_per,
    check_token_sizes,
    chosen_goal,
    chosen_rounding,
    finite,
    have_sizes,
    path_text,
    whole,
)
from alloc_moe.compiler.records import (
    SIZED,
    Allocation,
    CacheType,
    CalibrationOptions,
    CompileOptions,
    CorrectionMode,
    CostKind,
    Device,
    DType,
    Form,
    Metric,
    OffloadMode,
    PlanOptions,
    PricePer,
    ProfileOptions,
    Redistribution,
    Rounding,
    TargetOptions,
    Weights,
)
from alloc_moe.runtime.artifact.torch_file import EXPORT, SCRIPT
from alloc_moe.runtime.console import Console

if TYPE_CHECKING:
    from alloc_moe.compiler.records import Compiled, SensitivityProfile


def compile(
    model: str | Path,
    *,
    budget: float | str | None = None,
    target_bytes: float | str | None = None,
    target_loss: float | None = None,
    output: str | Path = "out.onnx",
    calibration: str | Path | None = None,
    tokens: int = 8192,
    seed: int = 0,
    sensitivity: Metric = "fisher",
    profile: str | Path | None = None,
    redistribute: Redistribution | None = None,
    correct: CorrectionMode = "affine",
    weights: Weights = "keep",
    allocation: Allocation = "sensitivity",
    cost: CostKind | None = None,
    cost_batch: int = 1,
    cap: float | None = None,
    token_sizes: bool | None = None,
    refine: int = 0,
    refine_minutes: float = 10.0,
    dtype: DType = "float32",
    block: int = 128,
    rounding: Rounding | None = None,
    mixed_bits: bool = False,
    cache: CacheType = "float32",
    device: Device = "cpu",
    price_per: PricePer = "call",
    target: Form | None = None,
    offload: OffloadMode = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> Compiled:
    """Compile a Mixture-of-Experts checkpoint into an artifact on a budget.

    Every keyword is the option of that name of ``alloc-compile``, whose ``--help`` says more.

    Args:
        model: A folder in the Hugging Face layout, or the id of a model on the hub.
        budget: Expert activations per token: a float is a fraction of the model's, an int their
            number over all layers. Text is as for the command. With another `cost` a fraction of
            what the model's experts cost. None is 0.5, unless there is a target.
        target_bytes: Instead of a budget: the bytes of weights that a token reads, at most.
        target_loss: Instead of a budget: what the loss may rise by, in nats per calibration token.
        output: ``out.onnx``, ``out.pt`` (TorchScript), ``out.pt2`` (torch.export), or ``DIR/`` for
            a bundle.
        calibration: Text file, conversations (``.jsonl``) or dataset on the hub, to calibrate on.
        tokens: Calibration tokens.
        seed: Picks the windows of calibration text.
        sensitivity: What fewer experts in a layer cost.
        profile: Where the sensitivity profile is read, finished and kept.
        redistribute: Which of a token's experts run; None is ``price`` where that is possible, else
            ``threshold``.
        correct: How the experts that run make up for the others.
        weights: Whether weights of kept experts stay as the router gave them.
        allocation: Experts per layer by sensitivity, or the same everywhere.
        cost: What the budget is of: activations (None too), bytes or milliseconds.
        cost_batch: Tokens in the decode step that bytes or milliseconds are for.
        cap: No call runs more than this times a layer's experts per token.
        token_sizes: For ``price``: fit how large each expert is for a token to what enters the
            layer, instead of one size for all tokens. None is wherever that is possible.
        refine: How many of the best plans are measured as a whole.
        refine_minutes: How long, at most.
        dtype: Type of the weights.
        block: How many weights share a scale, at most: 16, 32, 64 or 128.
        rounding: How int8 and int4 weights are rounded: to the nearest, or so that their products
            change least on the calibration text (``gptq``); None is ``gptq`` for int4 and with
            `mixed_bits`, else ``nearest``.
        mixed_bits: Choose 4 or 8 bits for each layer's experts together with their number.
        cache: Type of keys and values between calls.
        device: Where the artifact will run.
        price_per: Whether a call has one price, or each of its sequences may have one, so that
            several can hold their budgets together.
        target: What is written, if the output's name leaves it open: ``checkpoint`` is a folder
            for transformers.
        offload: Whether decoder layers are read from disk when they run.
        trust_remote_code: Run Python code of the checkpoint.
        force: Replace an existing output.
        console: Where progress is told; None tells nothing but warnings.

    Returns:
        The artifact's path, its plan, and how far its logits are from PyTorch's.

    Raises:
        OptionsError: Options exclude each other, or there is no such choice.
        AllocMoeError: Anything else that the user can act on; no output file was touched then.
    """
    from alloc_moe.compiler.pipeline import compile_model

    if mixed_bits:
        check_mixed_bits(dtype, cost, allocation, sensitivity, redistribute)
    goal, given_cost = chosen_goal(target_bytes, target_loss, budget), cost
    if budget is None:
        budget = 0.5 if goal is None else 1.0
    cost = cost or ("bytes" if mixed_bits else "activations")
    if redistribute is None:
        priced = cost == "activations" and have_sizes(allocation, sensitivity)
        redistribute = "price" if priced else "threshold"
    options = CompileOptions(
        model=path_text("MODEL", model),
        output=_with_slash(output),
        budget=budget_text(budget),
        goal=goal,
        calibration=_calibration(calibration, tokens, seed),
        sensitivity=sensitivity,
        profile=None if profile is None else Path(path_text("--profile", profile)),
        plan=PlanOptions(
            redistribution=redistribute,
            weights=weights,
            correction=correct,
            allocation=allocation,
            cost=cost,
            cost_batch=whole("--cost-batch", cost_batch, 1, 65536),
            cap=None if cap is None else finite("--cap", cap, 1, 1e6),
            refine=whole("--refine", refine, 0, 100_000),
            refine_seconds=60 * finite("--refine-minutes", refine_minutes, 0, 1e6, above=True),
        ),
        token_sizes=token_sizes,
        target=TargetOptions(
            dtype,
            whole("--block", block),
            mixed_bits,
            cache,
            device,
            chosen_rounding(rounding, dtype, mixed_bits=mixed_bits),
            price_per,
            target,
        ),
        offload=offload,
        trust_remote_code=trust_remote_code,
        force=force,
    )
    check_names(options, sensitivity, offload)
    check_plan(options.plan, sensitivity)
    check_goal(goal, options.plan, given_cost, sensitivity)
    check_token_sizes(options)
    check_price_per(options.target, options.plan)
    check_cache(options.target)
    return compile_model(options, console or Console(quiet=True))


def profile(
    model: str | Path,
    *,
    output: str | Path | None = None,
    calibration: str | Path | None = None,
    tokens: int = 8192,
    seed: int = 0,
    sensitivity: Metric = "fisher",
    redistribute: Redistribution | None = None,
    correct: CorrectionMode = "affine",
    dtype: DType = "float32",
    block: int = 128,
    rounding: Rounding | None = None,
    offload: OffloadMode = "auto",
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> SensitivityProfile:
    """Measure how sensitive each layer of a checkpoint is to fewer experts, for any budget.

    Every keyword is the option of that name of ``alloc-profile``; those that `compile` has too
    are as there. Started by ``torchrun`` the processes share the work.

    Args:
        model: A folder in the Hugging Face layout, or the id of a model on the hub.
        output: Where the profile is kept; one that is there is finished. None keeps nothing.
        calibration: Text file, conversations (``.jsonl``) or dataset on the hub.
        tokens: Calibration tokens.
        seed: Picks the windows of calibration text.
        sensitivity: What fewer experts in a layer cost, in the metric's own unit: nats per token
            for ``fisher`` and ``kl``, perplexity for ``ppl-suffix``, a relative squared error for
            ``output`` and ``data-free``.
        redistribute: What runs while it is measured.
        correct: How layers are corrected meanwhile.
        dtype: float32, int8 or int4: measure with weights so rounded.
        block: How many weights share a scale, at most.
        rounding: How weights are rounded, as for `compile`.
        offload: Whether decoder layers are read from disk when they run.
        trust_remote_code: Run Python code of the checkpoint.
        console: Where progress is told; None tells nothing but warnings.

    Returns:
        ``costs[l][k - 1]``, the cost of k experts in MoE layer l.

    Raises:
        OptionsError: There is no such choice.
        AllocMoeError: Anything else that the user can act on.
    """
    from alloc_moe.compiler.pipeline import profile_model
    from alloc_moe.compiler.workspace.processes import joined_processes

    options = profile_options(
        model,
        output,
        calibration=calibration,
        tokens=tokens,
        seed=seed,
        sensitivity=sensitivity,
        redistribute=redistribute,
        correct=correct,
        dtype=dtype,
        block=block,
        rounding=rounding,
        offload=offload,
        trust_remote_code=trust_remote_code,
    )
    with joined_processes() as processes:
        talks = console if console is not None and processes.writes else Console(quiet=True)
        return profile_model(options, talks, processes)


def profile_options(
    model: str | Path,
    output: str | Path | None,
    *,
    calibration: str | Path | None,
    tokens: int,
    seed: int,
    sensitivity: Metric,
    redistribute: Redistribution | None,
    correct: CorrectionMode,
    dtype: DType,
    block: int,
    rounding: Rounding | None,
    offload: OffloadMode,
    trust_remote_code: bool,
) -> ProfileOptions:
    """Return the options of `profile`, checked.

    Raises:
        OptionsError: There is no such choice.
    """
    if redistribute is None:
        redistribute = "price" if sensitivity in SIZED else "threshold"
    options = ProfileOptions(
        model=path_text("MODEL", model),
        path=None if output is None else Path(path_text("--output", output)),
        calibration=_calibration(calibration, tokens, seed),
        sensitivity=sensitivity,
        redistribution=redistribute,
        correction=correct,
        dtype=dtype,
        block=whole("--block", block),
        rounding=chosen_rounding(rounding, dtype),
        offload=offload,
        trust_remote_code=trust_remote_code,
    )
    check_choice("--sensitivity", sensitivity, get_args(Metric))
    check_choice("--redistribute", redistribute, get_args(Redistribution))
    check_choice("--correct", correct, get_args(CorrectionMode))
    check_choice("--dtype", dtype, ("float32", "int8", "int4"))
    check_choice("--rounding", options.rounding, get_args(Rounding))
    check_choice("--offload", offload, get_args(OffloadMode))
    return options


def _calibration(text: str | Path | None, tokens: int, seed: int) -> CalibrationOptions:
    return CalibrationOptions(
        None if text is None else path_text("--calibration", text),
        whole("--tokens", tokens, 2, MOST_TEXT),
        whole("--seed", seed, 0, MOST_SEED),
    )


def _with_slash(output: str | Path) -> str:
    """Return the output as the command takes it: a path of no artifact's file is a bundle's."""
    text = path_text("--output", output)
    if isinstance(output, Path) and output.suffix not in (".onnx", SCRIPT, EXPORT):
        return f"{text}/"
    return text
