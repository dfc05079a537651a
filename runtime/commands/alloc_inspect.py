"""alloc-inspect: the plan in an artifact as a table."""

from __future__ import annotations

import json

import click

from alloc_moe.runtime.commands.options import common_options, examples
from alloc_moe.runtime.console import Console


@click.command(epilog=examples("alloc-inspect out.onnx", "alloc-inspect bundle/ --json"))
@click.argument("artifact", type=click.Path())
@common_options
def inspect_command(console: Console, artifact: str) -> None:
    """Show what was decided when ARTIFACT was compiled; its weights aren't needed for that."""
    from alloc_moe.runtime.artifact.files import find_artifact
    from alloc_moe.runtime.commands.tables import plan_table

    files = find_artifact(artifact)
    data = {"artifact": str(files.graph), **json.loads(files.plan.to_json())}
    console.result(plan_table(files.plan, name=str(files.graph)), data)
