"""alloc-profile: options in, exit code out. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from alloc_moe.compiler.commands.options import profiling_options, rounding_options, wrong_options
from alloc_moe.compiler.errors import need_compile_extra
from alloc_moe.runtime.commands.failures import Command
from alloc_moe.runtime.commands.options import common_options, examples
from alloc_moe.runtime.console import Console


@click.command(
    cls=Command,
    epilog=examples(
        "alloc-profile examples/tiny-moe -o profile.json --sensitivity ppl-suffix",
        "torchrun --no-python --nproc-per-node 2 alloc-profile examples/tiny-moe -o profile.json",
    ),
)
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The profile; an unfinished one is finished.",
)
@profiling_options(". A profile for --cost bytes or latency needs threshold")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "int8", "int4"]),
    default="float32",
    show_default=True,
    help="Measure with weights rounded as alloc-compile --dtype stores them.",
)
@rounding_options
@common_options
def profile_command(console: Console, /, model: str, output: Path, **options: Any) -> None:
    """Measure how sensitive each layer of MODEL is to fewer experts, for any budget."""
    need_compile_extra()
    from alloc_moe.compiler.api import profile_options
    from alloc_moe.compiler.pipeline import profile_model
    from alloc_moe.compiler.workspace.processes import joined_processes

    with wrong_options():
        wanted = profile_options(model, output, **options)
    with joined_processes() as processes:
        if not processes.writes:
            console = Console(quiet=True)
        profile = profile_model(wanted, console, processes)
        if processes.writes:
            console.result(
                f"Wrote {output}: {profile.metric} of {len(profile.costs)} MoE layers on "
                f"{profile.tokens} tokens, {profile.seconds:.1f} s",
                {"profile": str(output), "metric": profile.metric, "seconds": profile.seconds},
            )
