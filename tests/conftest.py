"""Small random checkpoints of every supported family, made once per test session."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a family's name to the folder of its checkpoint."""

    @functools.cache
    def make(family: str) -> Path:
        # Loaded here, since it loads torch, which tests of the runtime do without.
        small = _load_file(Path(__file__).parents[1] / "examples" / "checkpoints" / "small.py")
        folder = tmp_path_factory.mktemp(family)
        return small.save_checkpoint(folder, small.FAMILIES[family])  # type: ignore[no-any-return]

    return make


@pytest.fixture(scope="session")
def synthetic_sweep() -> ModuleType:
    """Return the module that makes up results of sweeps."""
    return _load_file(Path(__file__).parent / "compiler" / "sweep" / "synthetic_sweep.py")


@pytest.fixture(scope="session")
def toy_artifact() -> ModuleType:
    """Return the module that writes a toy artifact."""
    return _load_file(Path(__file__).parent / "runtime" / "conftest.py")


@pytest.fixture(scope="session")
def step_interpreter() -> ModuleType:
    """Return the module that runs step programs in numpy."""
    return _load_file(Path(__file__).parent / "passes" / "step" / "interpreter.py")
