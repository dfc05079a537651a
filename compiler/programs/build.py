"""Model and plan -> a file of TorchScript or torch.export, ready to be verified."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.choices import check_onnx_only
from alloc_moe.compiler.model.quiet import first_line, quiet
from alloc_moe.compiler.package.paths import data_path
from alloc_moe.compiler.package.weights import drop_journals
from alloc_moe.compiler.programs.capture import capture
from alloc_moe.compiler.programs.script import to_script
from alloc_moe.compiler.programs.weights import mapped_weights
from alloc_moe.compiler.workspace.files import cant_write
from alloc_moe.runtime.artifact.torch_file import SCRIPT
from alloc_moe.runtime.execution.torch_programs.loading import Interface

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.programs.capture import Captured
    from alloc_moe.compiler.records import Correction, TargetOptions
    from alloc_moe.runtime.artifact.plan import AllocationPlan
    from alloc_moe.runtime.console import Console

DTYPES = ("float32", "bfloat16")
"""What weights of a program can be."""


def check_program(target: TargetOptions, output: Path) -> None:
    """Raise OptionsError for what there is in ONNX artifacts only: before anything is loaded."""
    check_onnx_only(
        target,
        DTYPES,
        f"{output.name} is one of torch, which has {' and '.join(DTYPES)} on the CPU. Write "
        f"{output.with_suffix('.onnx').name}.",
    )


def build(
    moe: MoeModel,
    plan: AllocationPlan,
    corrections: Sequence[Correction | None],
    path: Path,
    *,
    dtype: str,
    console: Console,
) -> Interface:
    """Write the program, without the plan.

    Args:
        moe: The model.
        plan: What is compiled in.
        corrections: What its experts are changed by, per MoE layer.
        path: The file; its name's end says which of the two it is.
        dtype: One of `DTYPES`.
        console: Where progress is told.

    Returns:
        What the program takes.

    Raises:
        UnsupportedModelError: It has no form in TorchScript.
        OutputError: It can't be written.
    """
    with console.step("Tracing the model under the plan"):
        captured = capture(moe.checkpoint, plan, dtype=dtype, corrections=corrections)
    state = mapped_weights(captured, moe, corrections, path, console)
    with console.step("Writing the program"), quiet():
        save: Callable[[str], object] = functools.partial(_save_export, captured, state)
        if path.suffix == SCRIPT:
            save = to_script(captured, state).save
        try:
            save(str(path))
        except RuntimeError as error:  # of torch's writer, whatever went wrong
            then = "free some space, or choose another disk"
            raise cant_write("The artifact", path, first_line(error), then=then) from error
    del state
    drop_journals(path.parent)
    data_path(path).unlink()
    return Interface(
        captured.vocabulary,
        captured.has_dial,
        captured.dtype,
        captured.cache,
    )


def _save_export(captured: Captured, state: dict[str, torch.Tensor], path: str) -> None:
    program = captured.program
    program.state_dict.update(state)
    program._example_inputs = None  # torch would pickle them
    torch.export.save(program, path)
