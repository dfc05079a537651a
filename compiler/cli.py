"""alloc-compile and alloc-profile: options in, exit code out. No logic."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alloc_moe.compiler.usage import (
    SCORED,
    SIZED,
    WITHOUT_ALLOCATION,
    block_option,
    check_mixed_bits,
    need_compile_extra,
    price_needs_sizes,
)
from alloc_moe.runtime.command import Console, common_options, examples

if TYPE_CHECKING:
    from alloc_moe.compiler.pipeline import Compiled
    from alloc_moe.compiler.records import (
        CorrectionMode,
        CostKind,
        DType,
        Metric,
        OffloadMode,
        Redistribution,
    )

_METRICS = click.Choice(["fisher", "kl", "ppl-suffix", "output", "data-free"])


def _profiling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that both commands take."""
    options = (
        click.option(
            "--calibration",
            metavar="FILE_OR_DATASET",
            help="Text to calibrate on. Default: calibration.txt beside the model, else a "
            "built-in text.",
        ),
        click.option(
            "--tokens",
            type=click.IntRange(min=2),
            default=8192,
            show_default=True,
            help="Calibration tokens.",
        ),
        click.option(
            "--seed", default=0, show_default=True, help="Picks the windows of calibration text."
        ),
        click.option(
            "--sensitivity",
            type=_METRICS,
            default="fisher",
            show_default=True,
            help="What fewer experts in a layer cost: the divergence from the full model as "
            "estimated in one pass with gradients (fisher), or as measured (kl); the paper's "
            "suffix perplexity; the change of the layer's output, on the text or on noise.",
        ),
        click.option(
            "--redistribute",
            "redistribution",
            type=click.Choice(
                ["price", "threshold", "batch", "sequence", "none", "top-p", "ratio"]
            ),
            help="Which of a token's experts run. One price for all layers and tokens; a threshold "
            "per layer; tokens compete within the call (batch) or the sequence; plain top-k "
            "(none); cumulative weight (top-p), or weight relative to the best expert's (ratio). "
            "Default: price; threshold where experts' sizes aren't measured (--sensitivity kl, "
            "ppl-suffix, data-free), the --cost isn't activations, or with --mixed-bits.",
        ),
        click.option(
            "--correct",
            "correction",
            type=click.Choice(["affine", "gain", "none"]),
            default="affine",
            show_default=True,
            help="Change the experts' weights to make up for those that don't run: by a factor per "
            "dimension and a shift per expert, or by one factor per layer. Sensitivities are "
            "measured with that.",
        ),
        click.option(
            "--offload",
            type=click.Choice(["auto", "never", "always"]),
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


@click.command(
    epilog=examples(
        "alloc-compile examples/tiny-moe --budget 0.5 -o out.onnx",
        "alloc-compile allenai/OLMoE-1B-7B-0924 --budget 64 --calibration notes.txt -o bundle/",
    )
)
@click.argument("model")
@click.option(
    "--budget",
    required=True,
    help="Expert activations per token: a fraction of the model's (0.5, 1.0), or their number over "
    "all layers (64). With another --cost: a fraction of what the model's experts cost.",
)
@click.option(
    "-o", "--output", required=True, help="out.onnx (and out.onnx.data), or DIR/ for a bundle."
)
@_profiling_options
@click.option(
    "--profile",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Sensitivity profile: used if complete, finished if not, made if missing. "
    "Default: OUTPUT.profile.json.",
)
@click.option(
    "--allocation",
    type=click.Choice(["sensitivity", "uniform"]),
    default="sensitivity",
    show_default=True,
    help="Experts per layer: optimal for the profile, or the same everywhere (no profile needed).",
)
@click.option(
    "--cost",
    type=click.Choice(["activations", "bytes", "latency"]),
    help="What the budget is of: expert activations, the bytes of expert weights that a decode "
    "step reads, or its milliseconds in experts, measured on this machine. Default: activations; "
    "bytes with --mixed-bits.",
)
@click.option(
    "--cost-batch",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Tokens in the decode step that --cost bytes or latency is for.",
)
@click.option(
    "--cap",
    metavar="FACTOR",
    type=click.FloatRange(min=1.0),
    help="No call runs more than this times a layer's experts per token. For price, threshold, "
    "top-p and ratio, which hold the budget in the mean only. Fixes the budget.",
)
@click.option(
    "--refine",
    metavar="N",
    type=click.IntRange(min=0),
    default=0,
    help="Measure the N best plans as a whole, then move experts between layers while that helps.",
)
@click.option(
    "--refine-minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="When to stop refining; the same command goes on from there.",
)
@click.option(
    "--weights",
    type=click.Choice(["keep", "renorm"]),
    default="keep",
    show_default=True,
    help="Weights of the kept experts: the router's own, or scaled up to the sum of all.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16", "int8", "int4"]),
    default="float32",
    show_default=True,
    help="Type of the weights. int8 and int4 are rounded in blocks, with float32 activations "
    "(float16 for --device cuda). float16 and bfloat16 are for --device cuda, bfloat16 must be "
    "compiled where CUDA is.",
)
@block_option
@click.option(
    "--cache",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    show_default=True,
    help="Type of keys and values between calls; int8 makes long contexts faster, and is for the "
    "CPU. (16-bit activations have a 16-bit cache.)",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where the artifact will run: decides how dropped experts are skipped.",
)
@click.option(
    "--mixed-bits",
    is_flag=True,
    help="Choose 4 or 8 bits for each layer's experts together with their number. The budget is "
    "then of bytes (--cost bytes): a fraction of what the model's experts take in --dtype int4 or "
    "int8, one of which it needs and the other weights get.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@common_options
def compile_command(
    console: Console,
    /,
    redistribution: Redistribution | None,
    cost: CostKind | None,
    mixed_bits: bool,
    cap: float | None,
    refine_minutes: float,
    block: str,
    **options: Any,
) -> None:
    """Compile MODEL, a Mixture-of-Experts checkpoint, into an ONNX artifact on a budget.

    MODEL is a folder in the Hugging Face layout or the id of a model on the hub.
    """
    need_compile_extra()
    from alloc_moe.compiler.pipeline import compile_model
    from alloc_moe.compiler.records import CompileOptions

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise click.UsageError(
            "alloc-compile works in one process. Measure the profile on many with alloc-profile, "
            "then compile with --profile."
        )
    if mixed_bits:
        checked = {name: options[name] for name in ("dtype", "allocation", "sensitivity")}
        check_mixed_bits(**checked, cost=cost, redistribution=redistribution)
    cost = cost or ("bytes" if mixed_bits else "activations")
    sized = options["sensitivity"] in SIZED or options["allocation"] == "uniform"
    if redistribution is None:
        redistribution = "price" if sized and cost == "activations" else "threshold"
    if redistribution == "price" and not sized:
        raise click.UsageError(price_needs_sizes(options["sensitivity"]))
    if cap is not None and redistribution not in SCORED:
        raise click.UsageError(f"--cap is for {', '.join(SCORED)}; {redistribution} is exact.")
    if cost != "activations" and redistribution in WITHOUT_ALLOCATION:
        raise click.UsageError(
            f"--cost {cost} divides a budget among layers, which {redistribution} does "
            "by itself. Use --redistribute threshold, batch, sequence or none."
        )
    if options["cache"] == "int8" and (
        options["device"] == "cuda" or options["dtype"] in ("float16", "bfloat16")
    ):
        raise click.UsageError("--cache int8 is for --device cpu and 32-bit activations.")
    if options["refine"] and redistribution in ("top-p", "ratio"):
        raise click.UsageError(f"--redistribute {redistribution} leaves nothing to refine.")
    compiled = compile_model(
        CompileOptions(
            **options,
            redistribution=redistribution,
            cost=cost,
            mixed_bits=mixed_bits,
            cap=cap,
            refine_seconds=60 * refine_minutes,
            block=int(block),
        ),
        console,
    )
    console.result(_summary(compiled), _summary_json(compiled))


@click.command(
    epilog=examples(
        "alloc-profile examples/tiny-moe -o profile.json --sensitivity ppl-suffix",
        "torchrun --no-python --nproc-per-node 2 alloc-profile examples/tiny-moe -o profile.json",
    )
)
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The profile; an unfinished one is finished.",
)
@_profiling_options
@click.option(
    "--dtype",
    type=click.Choice(["float32", "int8", "int4"]),
    default="float32",
    show_default=True,
    help="Measure with weights rounded as alloc-compile --dtype stores them.",
)
@block_option
@common_options
def profile_command(
    console: Console,
    /,
    model: str,
    output: Path,
    calibration: str | None,
    tokens: int,
    seed: int,
    sensitivity: Metric,
    redistribution: Redistribution | None,
    correction: CorrectionMode,
    trust_remote_code: bool,
    offload: OffloadMode,
    dtype: DType,
    block: str,
) -> None:
    """Measure how sensitive each layer of MODEL is to fewer experts, for any budget."""
    need_compile_extra()
    from alloc_moe.compiler.pipeline import calibrate, load
    from alloc_moe.compiler.processes import joined_processes
    from alloc_moe.compiler.quantization import rounded
    from alloc_moe.compiler.saved_passes import passes_path
    from alloc_moe.compiler.sensitivity import measure_sensitivity

    with joined_processes() as processes:
        if not processes.writes:
            console = Console(quiet=True)
        moe = load(
            model,
            console,
            trust_remote_code=trust_remote_code,
            offload=offload,
            passes=passes_path(output),
        )
        moe = rounded(moe, dtype, block=int(block))
        profile = measure_sensitivity(
            moe,
            calibrate(moe, calibration, console, tokens=tokens, seed=seed),
            metric=sensitivity,
            redistribution=redistribution or ("price" if sensitivity in SIZED else "threshold"),
            correction=correction,
            path=output,
            console=console,
            processes=processes,
        )
        moe.passes.delete()  # by every process: machines have disks of their own
        if processes.writes:
            console.result(
                f"Wrote {output}: {profile.metric} of {len(profile.costs)} MoE layers on "
                f"{profile.tokens} tokens, {profile.seconds:.1f} s",
                {"profile": str(output), "metric": profile.metric, "seconds": profile.seconds},
            )


def _summary(compiled: Compiled) -> str:
    budget = compiled.plan.budget
    ks = " ".join(f"{layer.k:.4g}" for layer in compiled.plan.layers)
    bits = [layer.bits for layer in compiled.plan.layers if layer.bits]
    of_bits = f"Bits per layer: {' '.join(map(str, bits))}\n" if bits else ""
    cost = compiled.plan.cost
    of_cost = (
        f"Cost of experts: {cost['planned']:.4g} of {cost['original']:.4g} {cost['unit']} in a "
        f"decode step of batch {cost['batch']}, at most {cost['limit']:.4g}\n"
        if cost
        else ""
    )
    return (
        f"Wrote {compiled.path}: {budget.activations:.6g} of {budget.original} expert activations "
        f"per token, redistribution {compiled.plan.redistribution}\n"
        f"Experts per layer: {ks}\n"
        f"{of_bits}{of_cost}"
        f"Largest logit error against PyTorch: {compiled.verification.max_abs_logit_error:.1e} "
        f"over {compiled.verification.tokens} tokens"
    )


def _summary_json(compiled: Compiled) -> dict[str, Any]:
    import json

    return {
        "output": str(compiled.path),
        "profile": str(compiled.profile) if compiled.profile else None,
        "plan": json.loads(compiled.plan.to_json()),
    }
