"""Small random checkpoints of every supported family, made once per test session."""

from __future__ import annotations

import functools
import importlib.util
import os
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import hypothesis
import onnxruntime
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

LONGEST = (
    "test_end_to_end.py",
    "compiler/export/test_graph.py",  # captures what most of the others need
    "runtime/cuda/test_steps.py",
    "compiler/programs/test_build.py",
    "compiler/programs/test_compile.py",
    "compiler/commands/test_alloc_compile.py",
    "compiler/verify/test_artifact_run.py",
    "examples/test_random_artifact.py",
    "examples/test_gpu_benchmark.py",
    "compiler/export/test_step_programs.py",
    "compiler/package/test_peak_memory.py",
    "examples/test_peers.py",
    "test_wheel.py",
)
"""Files that take the longest. They begin first, so that both processes end at about one time."""

CHECKPOINTS = Path(__file__).parents[1] / "examples" / "checkpoints"


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist hand files out in their order, not those of the most tests first."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test the families that its argument asks for, unless it names some itself.

    ``family``: those that stand for all. ``any_family``: all, for tests that take no time.
    ``compiled_family``: all, but those that stand for none are run by ``pytest -m families`` only.
    """
    few, every = _families()
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


@functools.cache
def _families() -> tuple[list[str], list[str]]:
    """Return the families that stand for all, and all: read once, since every test asks."""
    settings = tomllib.loads((CHECKPOINTS / "families.toml").read_text("utf-8"))
    return settings["representative"], list(settings["families"])


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


class _OneThread(onnxruntime.SessionOptions):  # type: ignore[misc]
    """Settings of a session that has one thread, unless it is told to have more."""

    def __init__(self) -> None:
        super().__init__()
        self.intra_op_num_threads = 1


@pytest.fixture(scope="session", autouse=True)
def sessions_of_one_thread() -> Iterator[None]:
    """Give sessions one thread each: idle ones spin, and take the cores from the other tests."""
    with mock.patch.object(onnxruntime, "SessionOptions", _OneThread):
        yield


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Small models run fastest on one thread, and much faster beside other work."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def captured_once(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Capture every model once in a run, in whichever process of it: that takes many seconds."""
    normalize = pytest.importorskip("alloc_moe.compiler.export.normalize")
    graph = pytest.importorskip("alloc_moe.compiler.export.graph")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all processes
    (folder / "captures").mkdir(exist_ok=True)
    captures = _load_file(Path(__file__).parent / "captures.py").Captures(folder / "captures")
    with (
        mock.patch.object(graph, "export_graph", captures),
        mock.patch.object(normalize, "export_graph", captures),
    ):
        yield


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return what runs codes in processes of their own, with torch and the compiler loaded."""
    if not hasattr(os, "fork"):
        pytest.skip("processes can't be forked here")
    forking = _load_file(Path(__file__).parent / "warm.py").Warm(tmp_path_factory.mktemp("warm"))
    yield forking
    forking.close()


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
