"""The base install is enough to run artifacts: the runtime loads nothing of the compiler's."""

from __future__ import annotations

import subprocess
import sys

import pytest

FORBIDDEN = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "scipy", "safetensors")
EXTRAS = ("jinja2", "starlette", "uvicorn")


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules and alloc_moe packages that a statement loads."""
    code = f"{statement}\nimport sys; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    modules = run.stdout.splitlines()[-1].split()
    return {name.partition(".")[0] for name in modules} | {
        ".".join(name.split(".")[:2]) for name in modules if name.startswith("alloc_moe.")
    }


@pytest.mark.parametrize(
    "statement",
    [
        "import alloc_moe.runtime as r; [getattr(r, name) for name in r.__all__]",
        "import alloc_moe.runtime.commands.alloc_run, alloc_moe.runtime.commands.alloc_bench, "
        "alloc_moe.runtime.measure.evaluate, alloc_moe.runtime.execution.session",
        "import alloc_moe.runtime.execution.torch_programs.session",
    ],
)
def test_runtime_loads_nothing_of_the_compiler(statement: str) -> None:
    loaded = loaded_by(statement)
    assert not loaded & {*FORBIDDEN, "alloc_moe.compiler", "alloc_moe.passes"}
    assert not loaded & {*EXTRAS, "alloc_moe.runtime.serving"}


@pytest.mark.parametrize("command", ["run", "inspect", "bench", "serve"])
def test_help_needs_no_onnxruntime(command: str) -> None:
    loaded = loaded_by(
        f"from alloc_moe.runtime.commands.alloc_{command} import {command}_command as command\n"
        "command.main(['--help'], standalone_mode=False)"
    )
    assert not loaded & {"onnxruntime", "numpy", "tokenizers", "jinja2", "starlette"}
