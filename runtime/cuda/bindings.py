"""NVIDIA's Python packages, if they are there, and their errors as ours."""

from __future__ import annotations

from typing import Any

from alloc_moe.runtime.errors import DeviceError

try:
    from cuda.bindings import driver as driver
    from cuda.bindings import nvrtc as nvrtc
except ImportError:  # the extra `cuda` has them
    driver = nvrtc = None

LEAST_CAPABILITY = (8, 0)
"""What the kernels need: bfloat16 and TF32 in the tensor cores."""


def missing() -> str | None:
    """Return why kernels can't be compiled here, None if they can."""
    if driver is None:
        return "NVIDIA's Python packages are not installed (pip install 'alloc-moe[cuda]')"
    return None


def call(result: tuple[Any, ...]) -> Any:
    """Return what a function of the driver or of NVRTC gave besides its status.

    Raises:
        DeviceError: It failed.
    """
    status, *values = result
    if int(status):
        name = getattr(status, "name", str(status))
        raise DeviceError(f"CUDA failed: {name}.")
    return values[0] if len(values) == 1 else tuple(values)
