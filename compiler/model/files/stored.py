"""A checkpoint's tensors as floats: read from their place, scales undone, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alloc_moe.compiler.errors import CheckpointError
from alloc_moe.compiler.model.files.dequantize import (
    mxfp4_shape,
    scales_shape,
    undo_e8m0,
    undo_mxfp4,
    undo_scales,
)
from alloc_moe.compiler.model.files.headers import StoredTensor
from alloc_moe.compiler.model.files.json_files import read_json_object
from alloc_moe.compiler.model.files.quantization import (
    Quantization,
    check_names,
    read_quantization,
)
from alloc_moe.compiler.model.files.weight_files import CONFIG, WeightFiles, find_weight_files

_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_WHOLE = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_E8M0 = ("F8_E8M0", "U8")
TYPES = {**_FLOATS, **_WHOLE, **_FLOAT8}
"""What safetensors files call types that torch has."""
# Of activations and caches, in checkpoints with static scales: weights don't depend on them.
_ACTIVATION_SCALES = (".activation_scale", ".input_scale", ".k_scale", ".v_scale", ".q_scale")


@dataclass(frozen=True)
class _Scaled:
    """A quantised tensor and its scales."""

    scale: str
    shared: tuple[int, int] | None  # None: mxfp4


class StoredWeights:
    """The tensors of a checkpoint that stand for weights, whatever they are stored as.

    ``shapes`` are those of the tensors that `load` returns; what only serves to undo a
    quantisation isn't among them.
    """

    def __init__(self, files: WeightFiles, quantization: Quantization | None = None) -> None:
        self.files = files
        self.quantization = quantization
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._scaled: dict[str, tuple[str, _Scaled]] = {}  # name -> stored key, and how
        tensors = files.tensors
        if quantization is None:
            check_names(tensors)
        used: set[str] = set()
        for name, stored, scaled, shape in self._find_scaled():
            self._scaled[name] = stored, scaled
            self.shapes[name] = shape
            used |= {stored, scaled.scale}
        for key in tensors.keys() - used:
            self.shapes[key] = tensors[key].shape

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    @property
    def quantized(self) -> frozenset[str]:
        """The names of those that are stored quantised."""
        return frozenset(self._scaled)

    def only_for_activations(self, name: str) -> bool:
        """Whether a tensor scales activations or a cache, on which no weight depends."""
        return self.quantization is not None and name.endswith(_ACTIVATION_SCALES)

    def holds_floats(self, name: str) -> bool:
        """Whether `load` returns floats that are the weights themselves."""
        return name in self._scaled or self.files.tensors[name].dtype in _FLOATS

    def described(self, name: str) -> str:
        """Say how a tensor is stored."""
        key = self._scaled[name][0] if name in self._scaled else name
        tensor = self.files.tensors[key]
        return f"{tensor.dtype} in {self.files.name(tensor.path)}"

    def load(self, name: str) -> torch.Tensor:
        """Return a tensor, a new one on the CPU: as it is stored, or float32 if it is quantised.

        Raises:
            CheckpointError: The file can't be read, or scales are no positive numbers.
        """
        if name not in self._scaled:
            return self._raw(name)
        key, scaled = self._scaled[name]
        if scaled.shared is None:
            scales = self._raw(scaled.scale)
            self._check_scales(scaled.scale, undo_e8m0(scales))
            return undo_mxfp4(self._raw(key), scales)
        scale = self._scales(scaled.scale)
        self._check_scales(scaled.scale, scale)
        return undo_scales(self._raw(key), scale, scaled.shared)

    def _scales(self, key: str) -> torch.Tensor:
        if self.files.tensors[key].dtype in _E8M0:
            return undo_e8m0(self._raw(key))
        return self._raw(key).to(torch.float32)

    def _check_scales(self, key: str, scale: torch.Tensor) -> None:
        if not bool((scale.isfinite() & (scale >= 0)).all()):
            raise CheckpointError(
                f"Scales of {key} in {self.files.folder} are negative or no numbers. "
                "Download the checkpoint again."
            )

    def _raw(self, key: str) -> torch.Tensor:
        # Not mapped: a mapped shard keeps every page it has read until it is closed, and opening it
        # for each of many small tensors would take longer than reading them.
        tensor = self.files.tensors[key]
        nbytes = tensor.end - tensor.begin
        data = torch.empty(nbytes, dtype=torch.uint8)
        try:
            with tensor.path.open("rb") as file:
                file.seek(tensor.begin)
                size = file.readinto(data.numpy().data)
        except OSError as error:
            raise CheckpointError(f"{tensor.path} can't be read: {error}.") from error
        if size != nbytes:
            raise CheckpointError(
                f"Tensor {key} in {tensor.path} can't be read (it has {size} of {nbytes} bytes). "
                "The file may be truncated: download it again."
            )
        dtype = torch.uint8 if tensor.dtype == "F8_E8M0" else TYPES.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(f"Tensor {key} has the type {tensor.dtype}, which isn't read.")
        return data.view(dtype).reshape(tensor.shape)

    def _find_scaled(self) -> Iterator[tuple[str, str, _Scaled, tuple[int, ...]]]:
        """Yield name, stored key, how it is scaled and shape of each quantised weight."""
        if self.quantization is None:
            return
        for key, tensor in self.files.tensors.items():
            if self.quantization.method == "mxfp4":
                if key.endswith("_blocks"):
                    yield self._mxfp4(key, tensor)
            elif tensor.dtype in _FLOAT8:
                yield self._fp8(key, tensor)
            elif tensor.dtype in _FLOATS and f"{key}_scale_inv" in self.files.tensors:
                raise CheckpointError(
                    f"{key} is {self.described(key)}, yet has scales ({key}_scale_inv); only "
                    "float8 weights have. Download the checkpoint again."
                )

    def _mxfp4(self, key: str, tensor: StoredTensor) -> tuple[str, str, _Scaled, tuple[int, ...]]:
        name = key.removesuffix("_blocks")
        scale = f"{name}_scales"
        scales = self.files.tensors.get(scale)
        if scales is None:
            raise self._no_scale(key, scale)
        shape = mxfp4_shape(tensor.shape, scales.shape)
        if shape is None or (tensor.dtype, scales.dtype) != ("U8", "U8"):
            raise CheckpointError(
                f"{key} has {tensor.dtype} of shape {list(tensor.shape)} and its scales "
                f"{scales.dtype} of {list(scales.shape)}, which is not mxfp4 as gpt-oss has it. "
                "Download the checkpoint again."
            )
        return name, key, _Scaled(scale, None), shape

    def _fp8(self, key: str, tensor: StoredTensor) -> tuple[str, str, _Scaled, tuple[int, ...]]:
        assert self.quantization is not None
        scale = self._scale_of(key)
        if scale is None:
            raise self._no_scale(key, f"{key}_scale_inv")
        scales = self.files.tensors[scale]
        block = self.quantization.block
        fits = len(tensor.shape) in (2, 3)
        shared = scales_shape(tensor.shape, scales.shape, block) if fits else None
        if shared is None:
            blocks = f"blocks of {block[0]} by {block[1]}" if block else "one scale, or one per row"
            raise CheckpointError(
                f"The scales {scale} have the shape {list(scales.shape)}, which fits no {key} of "
                f"{list(tensor.shape)} with {blocks}. Take weight_block_size of the original "
                "config.json, or download the checkpoint again."
            )
        if scales.dtype not in (*_FLOATS, *_E8M0):
            raise CheckpointError(f"The scales {scale} are {scales.dtype}, which isn't read.")
        return key, key, _Scaled(scale, shared), tensor.shape

    def _scale_of(self, key: str) -> str | None:
        """Return the key of a weight's scales, by which it is multiplied in every dialect."""
        names = [f"{key}_scale_inv", f"{key}_scale"]
        if key.endswith(".weight"):
            stem = key.removesuffix("weight")
            names += [f"{stem}scale", f"{stem}qscale_weight"]
        found = [name for name in names if name in self.files.tensors]
        if len(found) > 1:
            raise CheckpointError(
                f"{key} has several scales, {' and '.join(found)}: which one counts is unknown."
            )
        return found[0] if found else None

    def _no_scale(self, key: str, scale: str) -> CheckpointError:
        return CheckpointError(
            f"{key} is {self.described(key)}, but its scales {scale} are missing in "
            f"{self.files.folder}. Download the checkpoint again."
        )


def open_weights(folder: Path, settings: Mapping[str, Any] | None = None) -> StoredWeights:
    """Return the tensors of a checkpoint; only headers are read.

    Args:
        folder: The checkpoint.
        settings: What its config.json holds; read if None.

    Raises:
        CheckpointError: There are none that can be read.
        UnsupportedModelError: They are quantised by a method that isn't undone.
    """
    if settings is None:
        settings = read_json_object(folder / CONFIG)
    quantization = read_quantization(settings)
    return StoredWeights(find_weight_files(folder, dict(settings)), quantization)
