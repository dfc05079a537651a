"""How hard the fuzzers try: a few examples each, or as many as ALLOC_MOE_FUZZ says."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("ALLOC_MOE_FUZZ", "0"))

# Random from run to run only where one asks for many.
settings.register_profile(
    "fuzz",
    max_examples=EXAMPLES or 50,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def _no_option_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def toy_graph(toy_artifact: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy artifact with a dial, its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("toy")
    write: Callable[..., Path] = toy_artifact.write_toy
    tokenizer: Any = toy_artifact.byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    return write(folder / "out.onnx", dial=True)
