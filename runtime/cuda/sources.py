"""The CUDA sources of the kernels, and what they are compiled from."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "kernels"
SOURCES = ("linear.cu", "attention.cu", "experts.cu", "rows.cu", "flash.cu", "grouped.cu")
TYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
"""What TYPE is in the sources, by the data type of activations."""
