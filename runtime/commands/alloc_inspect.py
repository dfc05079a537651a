"""alloc-inspect: the plan in an artifact as a table."""

from __future__ import annotations

import json

import click

from alloc_moe.runtime.commands.failures import Command
from alloc_moe.runtime.commands.options import common_options, examples
from alloc_moe.runtime.console import Console


@click.command(
    cls=Command,
    epilog=examples(
        "alloc-inspect out.onnx", "alloc-inspect bundle/ --json", "alloc-inspect out.onnx --check"
    ),
)
@click.argument("artifact", type=click.Path())
@click.option(
    "--check", is_flag=True, help="Instead read all data, and say whether they are as compiled."
)
@common_options
def inspect_command(console: Console, artifact: str, check: bool) -> None:
    """Show what was decided when ARTIFACT was compiled; its weights aren't needed for that."""
    from alloc_moe.runtime.artifact.checking import check_all
    from alloc_moe.runtime.artifact.files import checkpoint_plan, find_artifact
    from alloc_moe.runtime.artifact.plan import NO_STEP_KEY, STEP_KEY
    from alloc_moe.runtime.commands.tables import plan_table

    plan = None if check else checkpoint_plan(artifact)
    if plan is not None:
        console.result(
            plan_table(plan, name=artifact), {"artifact": artifact, **json.loads(plan.to_json())}
        )
        return
    files = find_artifact(artifact)
    if check:
        checked = check_all(files)
        sizes = ", ".join(f"{name} ({size} bytes)" for name, size in checked.items())
        console.result(
            f"{files.graph}: the data are as compiled: {sizes}",
            {"artifact": str(files.graph), "checked": checked},
        )
        return
    data = {"artifact": str(files.graph), **json.loads(files.plan.to_json())}
    digests = files.digests()
    step = None
    if STEP_KEY in files.onnx.metadata:
        step = "yes"
    elif NO_STEP_KEY in files.onnx.metadata:
        step = f"no: {files.onnx.metadata[NO_STEP_KEY]}"
    if step is not None:
        data["step_program"] = step
    table = plan_table(files.plan, name=str(files.graph), digests=digests, step=step)
    console.result(table, data)
    if files.onnx.data_files and not digests:
        console.note(
            "An earlier version compiled it, without a digest: nothing shows whether its data are "
            "the right ones."
        )
