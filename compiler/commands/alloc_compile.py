"""alloc-compile: options in, exit code out. No logic."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alloc_moe.compiler.commands.options import profiling_options, rounding_options, wrong_options
from alloc_moe.compiler.errors import need_compile_extra
from alloc_moe.runtime.commands.failures import Command
from alloc_moe.runtime.commands.numeric import BudgetText, FiniteFrom, WholeFrom
from alloc_moe.runtime.commands.options import common_options, examples
from alloc_moe.runtime.console import Console

if TYPE_CHECKING:
    from alloc_moe.compiler.records import Compiled


@click.command(
    cls=Command,
    epilog=examples(
        "alloc-compile examples/tiny-moe --budget 0.5 -o out.onnx",
        "alloc-compile examples/tiny-moe --target-bytes 1MB --dtype int4 -o small.onnx",
        "alloc-compile allenai/OLMoE-1B-7B-0924 --budget 64 --calibration notes.txt -o bundle/",
    ),
)
@click.argument("model")
@click.option(
    "--budget",
    type=BudgetText(),
    help="Expert activations per token: a fraction of the model's (0.5, 1.0), or their number over "
    "all layers (64). With another --cost: a fraction of what the model's experts cost.",
)
@click.option(
    "--target-bytes",
    metavar="N",
    help="Instead of a budget: the bytes of weights that a token reads at most, on average in "
    "decode: the experts that run and all else. 1.5MB is of 1000s, 1.5M of 1024s.",
)
@click.option(
    "--target-loss",
    metavar="NATS",
    type=FiniteFrom(0, 1e3, above=True),
    help="Instead of a budget: what the loss may rise by at most, in nats per token of the "
    "calibration text, against the full model before rounding. The plan that reads the fewest "
    "bytes is sought, and measured.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    help="out.onnx (and out.onnx.data), or DIR/ for a bundle. To run in torch: out.pt for "
    "TorchScript, out.pt2 for torch.export. For transformers: DIR/ with --target checkpoint.",
)
@profiling_options(", the --cost isn't activations, or with --mixed-bits")
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
    type=WholeFrom(1, 65536),
    default=1,
    show_default=True,
    help="Tokens in the decode step that --cost bytes or latency is for.",
)
@click.option(
    "--cap",
    metavar="FACTOR",
    type=FiniteFrom(1, 1e6),
    help="No call runs more than this times a layer's experts per token. For price, threshold, "
    "top-p and ratio, which hold the budget in the mean only. The artifact then has no dial.",
)
@click.option(
    "--token-sizes/--no-token-sizes",
    default=None,
    help="Fit how large each expert is for a token to what enters the layer, instead of one size "
    "for all tokens: less is lost at the same budget, for a small product more per layer. For "
    "--redistribute price and --sensitivity fisher. Default: wherever possible, which is "
    "for models in memory.",
)
@click.option(
    "--refine",
    metavar="N",
    type=WholeFrom(0, 100_000),
    default=0,
    help="Measure the N best plans as a whole, then move experts between layers while that helps.",
)
@click.option(
    "--refine-minutes",
    type=FiniteFrom(0, 1e6, above=True),
    default=10.0,
    show_default=True,
    help="When to stop refining; the same command goes on from there.",
)
@click.option(
    "--weights",
    type=click.Choice(["keep", "renorm"]),
    default="keep",
    show_default=True,
    help="Router weights of the kept experts: as they are, or scaled up to the sum of all.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16", "int8", "int4"]),
    default="float32",
    show_default=True,
    help="Type of the weights. int8 and int4 are rounded in blocks, with float32 activations "
    "(float16 for --device cuda). float16 and bfloat16 are for --device cuda, bfloat16 must be "
    "compiled where CUDA is. .pt and .pt2 take float32 and bfloat16, on the CPU.",
)
@rounding_options
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
    "--price-per",
    type=click.Choice(["call", "sequence"]),
    default="call",
    show_default=True,
    help="Whether a call of the artifact has one price of an activation, or each of its sequences "
    "may have its own, so that several hold their budgets together (--hold).",
)
@click.option(
    "--target",
    type=click.Choice(["onnx", "torchscript", "export", "checkpoint"]),
    help="What is written. Default: what the output's name says. checkpoint writes into DIR/ a "
    "folder for transformers: weights with the corrections folded in, and the plan beside them.",
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
def compile_command(console: Console, /, **options: Any) -> None:
    """Compile MODEL, a Mixture-of-Experts checkpoint, into an ONNX artifact on a budget.

    MODEL is a folder in the Hugging Face layout or the id of a model on the hub.
    """
    need_compile_extra()
    from alloc_moe.compiler.api import compile

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise click.UsageError(
            "alloc-compile works in one process. Measure the profile on many with alloc-profile, "
            "then compile with --profile."
        )
    if all(options[name] is None for name in ("budget", "target_bytes", "target_loss")):
        raise click.UsageError("Give one of --budget, --target-bytes and --target-loss.")
    with wrong_options():
        compiled = compile(**options, console=console)
    console.result(_summary(compiled), _summary_json(compiled))


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
        f"{of_bits}{of_cost}{_of_target(compiled.plan.target)}"
        f"Largest logit error against PyTorch: {compiled.verification.max_abs_logit_error:.1e} "
        f"over {compiled.verification.tokens} tokens"
    )


def _of_target(target: Mapping[str, Any]) -> str:
    """Say what came of a target, if there was one."""
    if not target:
        return ""
    read = (
        f"Weights read per token: {target['bytes']} bytes, of {target['bytes_original']} in the "
        "full model"
    )
    if target["asked"] == "bytes":
        return f"{read}, at most {target['most']:.0f}\n"
    return (
        f"{read}\nLoss added on the calibration text: {target['added_loss']:.4g} nats per token, "
        f"predicted {target['added_loss_predicted']:.4g}, at most {target['most']:g}\n"
    )


def _summary_json(compiled: Compiled) -> dict[str, Any]:
    return {
        "output": str(compiled.path),
        "profile": str(compiled.profile) if compiled.profile else None,
        "plan": json.loads(compiled.plan.to_json()),
    }
