"""Runs compiled artifacts: numpy, onnxruntime, tokenizers; torch for artifacts of torch only.

    import alloc_moe.runtime as runtime

    model = runtime.load("out.onnx")
    print(model.generate(["The committee"], max_new_tokens=32)[0].text)

Names are loaded when first used, so importing the package costs nothing. Functions on token ids are
in `alloc_moe.runtime.text.generation` and `alloc_moe.runtime.measure.evaluate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alloc_moe.runtime.artifact.dial import price_of
    from alloc_moe.runtime.artifact.plan import AllocationPlan
    from alloc_moe.runtime.errors import AllocMoeError, ArtifactError, DeviceError, GenerationError
    from alloc_moe.runtime.execution.session import ArtifactSession, open_session
    from alloc_moe.runtime.text.model import Completion, TextModel, load
    from alloc_moe.runtime.text.sampling import Sampling

_MODULES = {
    "AllocMoeError": "errors",
    "AllocationPlan": "artifact.plan",
    "ArtifactError": "errors",
    "ArtifactSession": "execution.session",
    "Completion": "text.model",
    "DeviceError": "errors",
    "GenerationError": "errors",
    "Sampling": "text.sampling",
    "TextModel": "text.model",
    "load": "text.model",
    "open_session": "execution.session",
    "price_of": "artifact.dial",
}

__all__ = [
    "AllocMoeError",
    "AllocationPlan",
    "ArtifactError",
    "ArtifactSession",
    "Completion",
    "DeviceError",
    "GenerationError",
    "Sampling",
    "TextModel",
    "load",
    "open_session",
    "price_of",
]


def __getattr__(name: str) -> Any:  # whatever the name stands for
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
