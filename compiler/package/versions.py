"""The versions that a plan records."""

from __future__ import annotations

import importlib.metadata

import onnxruntime

_RECORDED = ("alloc-moe", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def versions() -> dict[str, str]:
    """Return what this package and those that shape its artifacts are versions of."""
    found = {name: importlib.metadata.version(name) for name in _RECORDED}
    # Its distribution is onnxruntime or onnxruntime-gpu.
    return {**found, "onnxruntime": onnxruntime.__version__}
