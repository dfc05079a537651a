"""alloc-sweep: every way to spend a budget, measured and compared in one report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from alloc_moe.compiler.commands.options import wrong_options
from alloc_moe.compiler.errors import need_compile_extra
from alloc_moe.compiler.records import DType, Rounding
from alloc_moe.runtime.commands.failures import Command
from alloc_moe.runtime.commands.numeric import MOST_SEED, MOST_TEXT, BudgetText, WholeFrom
from alloc_moe.runtime.commands.options import common_options, examples, threads_option
from alloc_moe.runtime.console import Console

if TYPE_CHECKING:
    from alloc_moe.compiler.sweep.records import SweepResults

_BUDGETS = "0.25,0.375,0.5,0.625,0.75"
_WAYS = "int4-price,int4-one-size,int4-threshold,int4-k,int8-price,int8-k,mixed-int4,mixed-int8"
_PLANS = (
    "uniform,data-free,top-p,ratio,kl,ppl-suffix,batch,paper,threshold,price,price+affine,default"
)


@click.command(
    cls=Command,
    epilog=examples(
        "alloc-sweep examples/tiny-moe --text examples/tiny-moe/heldout.txt -o sweep",
        "alloc-sweep examples/tiny-moe --text notes.txt --budgets 0.5 "
        "--plans uniform,kl+batch,default -o sweep",
        "alloc-sweep examples/tiny-moe --text notes.txt --targets auto -o frontier",
    ),
)
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder.")
@click.option(
    "--text",
    required=True,
    type=click.Path(path_type=Path),
    help="Held-out text, UTF-8, or conversations (.jsonl).",
)
@click.option("--text-tokens", type=WholeFrom(2, MOST_TEXT), help="Take its first tokens only.")
@click.option(
    "--budgets",
    help=f"Fractions or numbers of experts.  [default: {_BUDGETS}; none with --targets]",
    callback=lambda context, option, text: tuple(
        BudgetText().convert(part, option, context)
        for part in ([] if text is None else text.split(","))
    ),
)
@click.option(
    "--plans",
    default=_PLANS,
    show_default=True,
    help="Ways to spend a budget: these names, or sums of a --sensitivity (or uniform), a "
    "--redistribute and a --correct, such as kl+batch+affine.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "int8", "int4"]),
    default="float32",
    show_default=True,
    help="Type of the weights, for --budgets.",
)
@click.option(
    "--rounding",
    type=click.Choice(get_args(Rounding)),
    help="For --dtype int8 and int4, as for alloc-compile.",
)
@click.option(
    "--targets",
    metavar="N,N",
    help="Bytes of weights that a token reads at most, each as for --target-bytes of "
    "alloc-compile: 0.8MB,1MB. auto: eight from one expert in each layer in int4 to all in int8.",
)
@click.option(
    "--ways",
    help=f"Ways to spend the bytes of --targets.  [default: {_WAYS}]",
)
@click.option(
    "--seeds", default="0", show_default=True, help="Each picks other calibration text: 0,1,2."
)
@click.option("--calibration", metavar="FILE_OR_DATASET", help="As for alloc-compile.")
@click.option("--tokens", type=WholeFrom(2, MOST_TEXT), default=8192, show_default=True)
@threads_option
@click.option("--trust-remote-code", is_flag=True, help="Run Python code of the checkpoint.")
@common_options
def sweep_command(
    console: Console,
    /,
    model: str,
    output: Path,
    text: Path,
    text_tokens: int | None,
    budgets: tuple[str, ...],
    plans: str,
    dtype: DType,
    rounding: Rounding | None,
    targets: str | None,
    ways: str | None,
    seeds: str,
    **options: Any,
) -> None:
    """Compile MODEL in many ways, run each on held-out text, and compare what they lose.

    Writes report.html (open it in a browser), its main chart as chart.svg (for a README), sweep.csv
    and sweep.json into the folder; with --targets also frontier.svg. A sweep that was interrupted
    goes on where it was.
    """
    need_compile_extra()
    from alloc_moe.compiler.choices import byte_count, chosen_rounding
    from alloc_moe.compiler.sweep.cells import SweepOptions, run_sweep
    from alloc_moe.compiler.sweep.methods import parse_method
    from alloc_moe.compiler.sweep.models import WeightType
    from alloc_moe.compiler.sweep.ways import parse_ways

    if targets is None:
        budgets = budgets or tuple(_BUDGETS.split(","))
    _check_combined(budgets, plans, dtype, rounding, targets, ways)
    ways = ways or _WAYS
    sizes = [] if targets is None or targets == "auto" else targets.split(",")
    with wrong_options():
        asked = SweepOptions(
            model,
            output,
            budgets,
            tuple(dict.fromkeys(parse_method(plan) for plan in plans.split(","))),
            text,
            text_tokens,
            seeds=_integers(seeds),
            weights=WeightType(dtype, chosen_rounding(rounding, dtype)),
            targets=tuple(dict.fromkeys(byte_count("--targets", size) for size in sizes)),
            ways=() if targets is None else parse_ways(ways.split(",")),
            **options,
        )
    said = {
        **({"--plans": plans, "--budgets": ",".join(budgets)} if budgets else {}),
        **({} if dtype == "float32" else {"--dtype": dtype}),
        **({"--rounding": rounding} if rounding else {}),
        **({} if targets is None else {"--targets": targets, "--ways": ways}),
        **({"--text-tokens": str(text_tokens)} if text_tokens else {}),
        **({"--calibration": options["calibration"]} if options["calibration"] else {}),
        "--tokens": str(options["tokens"]),
        "--seeds": seeds,
        "-o": str(output),
    }
    pairs = [part for pair in said.items() for part in pair]
    pairs += ["--trust-remote-code"] * options["trust_remote_code"]
    command = shlex.join(["alloc-sweep", model, "--text", str(text), *pairs])
    _write(run_sweep(asked, console, command=command), output, console)


def _check_combined(
    budgets: tuple[str, ...],
    plans: str,
    dtype: DType,
    rounding: Rounding | None,
    targets: str | None,
    ways: str | None,
) -> None:
    """Refuse options that nothing would go by."""
    if targets is None and ways is not None:
        raise click.UsageError("--ways are for --targets: give these too, such as auto.")
    if not budgets and (plans != _PLANS or dtype != "float32" or rounding):
        raise click.UsageError(
            "--plans, --dtype and --rounding are for --budgets; the --ways of --targets have types "
            "of their own. Leave them out, or give --budgets too."
        )


def _write(results: SweepResults, output: Path, console: Console) -> None:
    """Write what a sweep found in every form, and print its tables."""
    from alloc_moe.compiler.sweep.report.frontier.picture import draw_frontier
    from alloc_moe.compiler.sweep.report.frontier.tables import frontier_markdown
    from alloc_moe.compiler.sweep.report.page import render
    from alloc_moe.compiler.sweep.report.picture import draw_picture
    from alloc_moe.compiler.sweep.report.tables import markdown_table, to_csv
    from alloc_moe.compiler.workspace.files import save_text

    files = {"sweep.json": results.to_json(), "sweep.csv": to_csv(results)}
    tables = []
    if results.of_budgets.cells:
        files["chart.svg"] = draw_picture(results)
        tables.append(markdown_table(results))
    if results.of_targets.cells:
        files["frontier.svg"] = draw_frontier(results)
        tables.append(frontier_markdown(results))
    files["report.html"] = render(results)
    for name, content in files.items():
        save_text(content, output / name, what="The report")
    console.result(
        "\n".join([*tables, f"\nWrote {output / 'report.html'}"]),
        {"report": str(output / "report.html"), "results": str(output / "sweep.json")},
    )


def _integers(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of whole numbers such as 0,1,2.") from error
    if not all(0 <= seed <= MOST_SEED for seed in seeds):
        raise click.BadParameter(f"{text!r} has a seed outside 0 to {MOST_SEED}.")
    return tuple(dict.fromkeys(seeds))
