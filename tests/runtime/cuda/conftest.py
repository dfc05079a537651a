"""Artifacts for CUDA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="session")
def compiled_for_cuda(
    tmp_path_factory: pytest.TempPathFactory, captured_once: None
) -> Callable[..., Path]:
    """Return a function from a bundled model's name to its artifact for CUDA at half its budget."""
    from alloc_moe.compiler import api

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
            tokens=512,
        )
        return path

    return compiled
