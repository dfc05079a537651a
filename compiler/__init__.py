"""The compiler: checkpoint in, artifact out. Needs the extra [compile].

    from alloc_moe.compiler import compile

    compiled = compile("examples/tiny-moe", budget=0.5, output="out.onnx")

Begin reading at `pipeline`, which names the stages in their order; each room has one of them.
Names are loaded when first used, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alloc_moe.compiler.api import compile, profile
    from alloc_moe.compiler.errors import AllocMoeError
    from alloc_moe.compiler.records import Compiled, SensitivityProfile

_MODULES = {
    "AllocMoeError": "errors",
    "Compiled": "records",
    "SensitivityProfile": "records",
    "compile": "api",
    "profile": "api",
}

__all__ = ["AllocMoeError", "Compiled", "SensitivityProfile", "compile", "profile"]


def __getattr__(name: str) -> Any:  # whatever the name stands for
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
