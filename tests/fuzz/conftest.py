"""What the fuzzers work on; the profile "fuzz" of the tests says how hard they try."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


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
