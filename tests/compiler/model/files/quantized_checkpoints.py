"""Quantise the weights of a checkpoint as published models are, and say what they then are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def configure(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def floats(weights: torch.Tensor) -> np.ndarray:
    """Decode float8 without torch."""
    return weights.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def quantize_fp8(
    folder: Path,
    *,
    block: tuple[int, int] | None = (24, 16),
    by_row: bool = False,
    suffix: str = "_scale_inv",
    ue8m0: bool = False,
) -> dict[str, torch.Tensor]:
    """Quantise every projection; return what all tensors of the checkpoint stand for."""
    exact: dict[str, torch.Tensor] = {}

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, weight in list(tensors.items()):
            if not name.endswith("_proj.weight"):
                exact[name] = weight
                continue
            rows, columns = weight.shape
            down, across = block or ((1, columns) if by_row else (rows, columns))
            grid = torch.empty(-(-rows // down), -(-columns // across))
            quantized = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
            value = np.empty((rows, columns), np.float32)
            for i in range(len(grid)):
                for j in range(grid.shape[1]):
                    part = np.s_[i * down : (i + 1) * down, j * across : (j + 1) * across]
                    scale = weight[part].abs().max() / 448
                    scale = torch.exp2(scale.log2().ceil()) if ue8m0 else scale
                    grid[i, j] = scale
                    quantized[part] = (weight[part] / scale).to(torch.float8_e4m3fn)
                    value[part] = floats(quantized[part].contiguous()) * np.float32(scale)
            exact[name] = torch.from_numpy(value)
            tensors[name] = quantized
            key = name + suffix if suffix.startswith("_") else name.removesuffix("weight") + suffix
            scales = grid if block else grid[:, 0] if by_row else grid.reshape(())
            tensors[key] = scales.to(torch.float8_e8m0fnu) if ue8m0 else scales.contiguous()

    change(folder, edit)
    sides = None if block is None else list(block)
    configure(folder, quantization_config={**FP8, "weight_block_size": sides})
    return exact


def store_mxfp4(folder: Path) -> None:
    """Give a gpt-oss the random experts of a published one, whose scales suit its width."""
    random = torch.Generator().manual_seed(0)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
            for stem in (name, name.replace("gate_up", "down")):
                experts, inputs, outputs = tensors.pop(stem).shape
                shape = (experts, outputs, inputs // 32, 16)
                byte = torch.randint(256, shape, generator=random, dtype=torch.uint8)
                scale = torch.randint(121, 124, shape[:3], generator=random, dtype=torch.uint8)
                tensors |= {f"{stem}_blocks": byte, f"{stem}_scales": scale}

    change(folder, edit)
    configure(folder, quantization_config={"quant_method": "mxfp4"})
