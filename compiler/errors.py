"""Errors of the compiler that a user can act on."""

from __future__ import annotations

import importlib.util

from alloc_moe.runtime.errors import AllocMoeError


class OptionsError(AllocMoeError):
    """Options exclude each other, or one has a value that it can't have."""


class CheckpointError(AllocMoeError):
    """A checkpoint folder is missing files, or a file can't be read."""


class UnsupportedModelError(AllocMoeError):
    """The model is none that this compiler can allocate experts for."""


class TokenSizesError(UnsupportedModelError):
    """A model's tokens can't have sizes of their own; ``reason`` says why, of "they"."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(f"--token-sizes can't be: they {reason}. Leave it out{advice}.")
        self.reason = reason


class ProfileError(AllocMoeError):
    """A saved profile doesn't belong to this model, text or seed, or can't be read."""


class CalibrationError(AllocMoeError):
    """The calibration text can't be read, or is no use for the model."""


class BudgetError(AllocMoeError):
    """The activation budget can't be met by any plan."""


class CostError(AllocMoeError):
    """What experts cost can't be told or measured as asked for."""


class VerificationError(AllocMoeError):
    """The compiled graph doesn't compute what PyTorch computes with the same plan."""


class SweepError(AllocMoeError):
    """Results of a sweep can't be read."""


class ProcessError(AllocMoeError):
    """Another process of the run ended early."""


class OutputError(AllocMoeError):
    """The output can't be written where it was asked for."""


def need_compile_extra() -> None:
    """Raise an AllocMoeError that names what the base install lacks for compiling."""
    missing = [
        name
        for name in (
            "torch",
            "transformers",
            "onnx",
            "onnx_ir",
            "onnxscript",
            "accelerate",
            "scipy",
        )
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise AllocMoeError(
            f"Compiling needs {', '.join(missing)}, which the base install leaves out. "
            "Install alloc-moe[compile]."
        )


__all__ = [
    "AllocMoeError",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "CostError",
    "OptionsError",
    "OutputError",
    "ProcessError",
    "ProfileError",
    "SweepError",
    "UnsupportedModelError",
    "VerificationError",
    "need_compile_extra",
]
