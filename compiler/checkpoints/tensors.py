"""Named tensors -> a safetensors file, under its own name from the first byte.

The safetensors library writes into a hidden file of a random name first, which a killed compile
would leave, and which only its user may read.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from alloc_moe.compiler.model.files.stored import TYPES
from alloc_moe.compiler.workspace.files import create

_NAMES = {dtype: name for name, dtype in TYPES.items()}
_METADATA = {"__metadata__": {"format": "pt"}}  # transformers asks for it
_ALIGNED = 8


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file of tensors on the CPU.

    Those of wider types come first, so that each begins at a multiple of its items.

    Raises:
        OSError: The disk is full or fails.
    """
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    ends = list(itertools.accumulate((tensors[name].nbytes for name in ordered), initial=0))
    entries = {
        name: {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": list(place),
        }
        for name, place in zip(ordered, itertools.pairwise(ends), strict=True)
    }
    header = json.dumps(_METADATA | entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNED)
    with create(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in ordered:
            file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
