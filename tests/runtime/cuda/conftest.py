"""Artifacts for CUDA, and what emulates their kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="session")
def compiled_for_cuda(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from a bundled model's name to its artifact for CUDA at half its budget."""
    api = pytest.importorskip("alloc_moe.compiler.api")

    def compiled(name: str, dtype: str, redistribute: str) -> Path:
        path = tmp_path_factory.mktemp(name) / "out.onnx"
        api.compile(
            str(EXAMPLES / name),
            output=path,
            budget=0.5,
            device="cuda",
            dtype=dtype,
            redistribute=redistribute,
            correct="none",
        )
        return path

    return compiled


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    """Return the module that runs kernels on the CPU."""
    spec = importlib.util.spec_from_file_location(
        "emulator", Path(__file__).with_name("emulator.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.COMPILER is None:
        pytest.skip("no C++ compiler, by which kernels are emulated")
    return module
