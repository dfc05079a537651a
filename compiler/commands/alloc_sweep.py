"""alloc-sweep: every way to spend a budget, measured and compared in one report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from alloc_moe.compiler.errors import need_compile_extra
from alloc_moe.runtime.commands.failures import Command
from alloc_moe.runtime.commands.numeric import MOST_SEED, MOST_TEXT, BudgetText, WholeFrom
from alloc_moe.runtime.commands.options import common_options, examples, threads_option
from alloc_moe.runtime.console import Console

_PLANS = (
    "uniform,data-free,top-p,ratio,kl,ppl-suffix,batch,paper,threshold,price,price+affine,default"
)


@click.command(
    cls=Command,
    epilog=examples(
        "alloc-sweep examples/tiny-moe --text examples/tiny-moe/heldout.txt -o sweep",
        "alloc-sweep examples/tiny-moe --text notes.txt --budgets 0.5 "
        "--plans uniform,kl+batch,default -o sweep",
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
    default="0.25,0.375,0.5,0.625,0.75",
    show_default=True,
    callback=lambda context, option, text: tuple(
        BudgetText().convert(part, option, context) for part in text.split(",")
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
    seeds: str,
    **options: Any,
) -> None:
    """Compile MODEL in many ways, run each on held-out text, and compare what they lose.

    Writes report.html (open it in a browser), its main chart as chart.svg (for a README), sweep.csv
    and sweep.json into the folder. A sweep that was interrupted goes on where it was.
    """
    need_compile_extra()
    from alloc_moe.compiler.sweep.cells import SweepOptions, run_sweep
    from alloc_moe.compiler.sweep.methods import parse_method
    from alloc_moe.compiler.sweep.report.page import render
    from alloc_moe.compiler.sweep.report.picture import draw_picture
    from alloc_moe.compiler.sweep.report.tables import markdown_table, to_csv
    from alloc_moe.compiler.workspace.files import save_text

    asked = SweepOptions(
        model,
        output,
        budgets,
        tuple(dict.fromkeys(parse_method(plan) for plan in plans.split(","))),
        text,
        text_tokens,
        seeds=_integers(seeds),
        **options,
    )
    command = shlex.join(
        [
            "alloc-sweep",
            model,
            "--text",
            str(text),
            "--plans",
            plans,
            "--budgets",
            ",".join(budgets),
        ]
        + (["--text-tokens", str(text_tokens)] if text_tokens else [])
        + ["--tokens", str(options["tokens"]), "--seeds", seeds, "-o", str(output)]
    )
    results = run_sweep(asked, console, command=command)
    for name, content in (
        ("sweep.json", results.to_json()),
        ("sweep.csv", to_csv(results)),
        ("report.html", render(results)),
        ("chart.svg", draw_picture(results)),
    ):
        save_text(content, output / name, what="The report")
    console.result(
        f"{markdown_table(results)}\n\nWrote {output / 'report.html'}",
        {"report": str(output / "report.html"), "results": str(output / "sweep.json")},
    )


def _integers(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of whole numbers such as 0,1,2.") from error
    if not all(0 <= seed <= MOST_SEED for seed in seeds):
        raise click.BadParameter(f"{text!r} has a seed outside 0 to {MOST_SEED}.")
    return seeds
