"""What imports an example as running it does."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session", autouse=True)
def fast(captured_once: None) -> None:
    """Capture no model again that another test had captured."""


@pytest.fixture
def examples() -> Path:
    """The folder of the examples."""
    return EXAMPLES


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Return what imports ``benchmarks/speed/peers`` and its neighbours; forgotten afterwards.

    They are found from the script's folder; a folder with an ``__init__.py`` is a package in it.
    """

    def import_script(name: str) -> ModuleType:
        path = EXAMPLES / name
        root = next(folder for folder in path.parents if not (folder / "__init__.py").exists())
        monkeypatch.syspath_prepend(str(root))
        return importlib.import_module(".".join(path.relative_to(root).parts))

    before = set(sys.modules)
    yield import_script
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).is_relative_to(EXAMPLES):
            del sys.modules[name]


@pytest.fixture
def speed(load: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """Return what imports a module of the benchmarks of speed."""
    return lambda name: load(f"benchmarks/speed/{name}")


@pytest.fixture
def read_little(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """Return what lets a benchmark read a megabyte for the bandwidth, not dozens of gigabytes."""

    def change(module: ModuleType) -> None:
        monkeypatch.setattr(module, "Reader", functools.partial(module.Reader, size=1 << 20))

    return change
