"""What a wheel of the project holds."""

from __future__ import annotations

import configparser
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    # Without the build backend at hand, pip fetches it.
    at_hand = importlib.util.find_spec("scikit_build_core") is not None
    isolation = ["--no-build-isolation"] if at_hand else []
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"),
            *("--disable-pip-version-check", *isolation, "-w", str(folder), str(ROOT)),
        ],
        check=True,
        capture_output=True,
    )
    [file] = folder.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.mark.slow
def test_every_module_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    found = {name for name in wheel.namelist() if name.startswith("alloc_moe/")}
    expected = {
        f"alloc_moe/{path.relative_to(ROOT).as_posix()}"
        for part in ("compiler", "passes", "runtime")
        for path in (ROOT / part).rglob("*")
        if path.suffix in (".py", ".txt", ".typed", ".css", ".js", ".html", ".cu", ".cuh")
        and "__pycache__" not in path.parts
    }
    assert found == expected
    assert {
        "alloc_moe/passes/experts/policies/__init__.py",
        "alloc_moe/compiler/calibration/built_in.txt",
        "alloc_moe/compiler/sweep/report/page.css",
        "alloc_moe/compiler/sweep/report/page.js",
        "alloc_moe/compiler/py.typed",
        "alloc_moe/passes/py.typed",
        "alloc_moe/runtime/cuda/kernels/experts.cu",
        "alloc_moe/runtime/serving/page.html",
        "alloc_moe/runtime/py.typed",
    } <= found


@pytest.mark.slow
def test_nothing_else_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    roots = {name.partition("/")[0] for name in wheel.namelist()}
    assert {root.partition("-")[0] for root in roots} == {"alloc_moe"}


@pytest.mark.slow
def test_every_command_is_installed(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(name).decode())
    scripts = dict(entries["console_scripts"])
    assert set(scripts) == {
        *("alloc-compile", "alloc-profile", "alloc-eval"),
        *("alloc-run", "alloc-bench", "alloc-inspect"),
        *("alloc-sweep", "alloc-lm-eval", "alloc-serve"),
    }
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.slow
def test_the_base_install_asks_for_no_torch(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    requirements = [
        line.removeprefix("Requires-Dist: ")
        for line in wheel.read(name).decode().splitlines()
        if line.startswith("Requires-Dist: ")
    ]
    base = {line.partition(">")[0] for line in requirements if "extra ==" not in line}
    assert base == {"click", "numpy", "rich", "tokenizers", "onnxruntime", "onnxruntime-gpu"}
