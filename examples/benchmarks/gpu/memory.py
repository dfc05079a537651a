"""How fast the card copies its own memory, and what card it is."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np

_BYTES = 1 << 30
_COPIES, _RUNS = 8, 7
_PACKAGES = ("torch", "transformers", "cuda-bindings", "cuda-core", "nvidia-cuda-nvrtc", "numpy")


def copy_speed(device: str) -> tuple[float, str]:
    """Return bytes read and written per second by a large copy, and how that was measured.

    Raises:
        RuntimeError: Neither cuda-bindings nor PyTorch is there, or CUDA fails.
    """
    if device == "cpu":
        source = np.ones(_BYTES >> 4, np.uint8)
        target = np.empty_like(source)
        return _speed(lambda: np.copyto(target, source), source.nbytes), "numpy"
    try:
        from cuda.bindings import driver

        return _driver_speed(driver), "cuMemcpyDtoD"
    except (ImportError, RuntimeError):  # no package, or no driver that it finds
        return _torch_speed(), "PyTorch"


def _driver_speed(driver: Any) -> float:
    def call(name: str, *arguments: Any) -> Any:
        code, *found = getattr(driver, name)(*arguments)
        if int(code):
            raise RuntimeError(f"{name} answers {code}.")
        return found[0] if found else None

    call("cuInit", 0)
    card = call("cuDeviceGet", 0)
    call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", card))
    source, target = (call("cuMemAlloc", _BYTES) for _ in range(2))
    call("cuMemsetD8", source, 7, _BYTES)

    def copy() -> None:
        for _ in range(_COPIES):
            call("cuMemcpyDtoDAsync", target, source, _BYTES, 0)
        call("cuCtxSynchronize")

    try:
        return _speed(copy, _BYTES * _COPIES)
    finally:
        for address in (source, target):
            call("cuMemFree", address)


def _torch_speed() -> float:
    try:
        import torch
    except ImportError as error:
        raise RuntimeError("The copy needs cuda-bindings or PyTorch.") from error
    source = torch.ones(_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(_COPIES):
            target.copy_(source)
        torch.cuda.synchronize()

    return _speed(copy, _BYTES * _COPIES)


def _speed(copy: Callable[[], object], size: int) -> float:
    """Return bytes read and written per second, the median of several runs after one."""
    seconds = []
    for _ in range(1 + _RUNS):
        start = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds[1:])


def machine() -> dict[str, str]:
    """Return what the figures depend on: card, driver, versions."""
    found = {"card": "none", "driver": "none"}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
        found["card"], found["driver"] = answer.stdout.splitlines()[0].split(", ")[:2]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        pass
    import onnxruntime

    found["onnxruntime"] = onnxruntime.__version__
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
