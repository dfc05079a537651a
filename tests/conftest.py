"""Small random checkpoints of every supported family, made once per test session."""

from __future__ import annotations

import functools
import importlib.util
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

# A busy machine is no failure.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

# How hard fuzzers try: a few examples each, or as many as this says, then random from run to run.
_EXAMPLES = int(os.environ.get("ALLOC_MOE_FUZZ", "0"))
hypothesis.settings.register_profile(
    "fuzz",
    max_examples=_EXAMPLES or 50,
    derandomize=not _EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)

CHECKPOINTS = Path(__file__).parents[1] / "examples" / "checkpoints"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test the families that its argument asks for, unless it names some itself.

    ``family``: those that stand for all. ``any_family``: all, for tests that take no time.
    ``compiled_family``: all, but those that stand for none are run by ``pytest -m families`` only.
    """
    settings = tomllib.loads((CHECKPOINTS / "families.toml").read_text("utf-8"))
    few, every = settings["representative"], list(settings["families"])
    marked = [
        pytest.param(family, marks=() if family in few else pytest.mark.families)
        for family in every
    ]
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    given = {
        argument.strip()
        for names in named
        for argument in (names.split(",") if isinstance(names, str) else names)
    }
    for argument, families in (
        ("family", few),
        ("any_family", every),
        ("compiled_family", marked),
    ):
        if argument in metafunc.fixturenames and argument not in given:
            metafunc.parametrize(argument, families)


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from a family's name, and changes, to the folder of its checkpoint."""

    @functools.cache
    def make(family: str, **changes: Any) -> Path:
        # Loaded here, since it loads torch, which tests of the runtime do without.
        small = _load_file(CHECKPOINTS / "small.py")
        folder = tmp_path_factory.mktemp(family)
        settings = {**small.FAMILIES[family], **changes}
        return small.save_checkpoint(folder, settings)  # type: ignore[no-any-return]

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


@pytest.fixture(scope="session")
def exported_attention() -> ModuleType:
    """Return the module that builds attention as it is exported."""
    return _load_file(Path(__file__).parent / "passes" / "attention" / "exported_attention.py")


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    """Return the module that runs kernels on the CPU."""
    module = _load_file(Path(__file__).parent / "runtime" / "cuda" / "emulator.py")
    if module.COMPILER is None:
        pytest.skip("no C++ compiler, by which kernels are emulated")
    return module
