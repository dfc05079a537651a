"""A checkpoint's tensors under the names of the model's parameters, read one at a time.

transformers 5 fuses and renames tensors while it loads: `layers.0.mlp.experts.7.up_proj.weight`
becomes a slice of `layers.0.mlp.experts.gate_up_proj`. The reader applies the same conversion to
single parameters, so that a graph's weights can be written without the model being in memory.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from alloc_moe.compiler.errors import CheckpointError
from alloc_moe.compiler.model.skeleton import parameter_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class _Source:
    """Where a parameter comes from: checkpoint keys, and the conversion that joins them."""

    keys: tuple[tuple[str, str], ...]  # (pattern, checkpoint key)
    converter: WeightConverter | None
    first_target: str


def find_shards(folder: Path) -> dict[str, Path]:
    """Return checkpoint key -> safetensors file.

    Raises:
        CheckpointError: No safetensors weights, a shard is missing, or one can't be read.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
            shards = {key: folder / name for key, name in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{index} is no safetensors index ({error!r}). Download it again."
            ) from error
        return _check_shards(folder, shards)
    single = folder / _SINGLE
    if single.is_file():
        return dict.fromkeys(_shard_keys(single), single)
    other = sorted(path.name for path in folder.glob("*.bin")) + sorted(
        path.name for path in folder.glob("*.pt*")
    )
    found = f"only {', '.join(other[:3])}, which may run code when read" if other else "none"
    raise CheckpointError(
        f"{folder} has no safetensors weights ({_SINGLE} or {_INDEX}); found {found}. "
        "Save the model with save_pretrained of transformers 5, which writes safetensors."
    )


def _check_shards(folder: Path, shards: dict[str, Path]) -> dict[str, Path]:
    for path in sorted(set(shards.values())):
        if not path.is_file():
            raise CheckpointError(
                f"Shard {path.name} is named in {_INDEX} but missing in {folder}. "
                "Download it again."
            )
        missing = {key for key, shard in shards.items() if shard == path} - set(_shard_keys(path))
        if missing:
            raise CheckpointError(
                f"Shard {path} lacks {len(missing)} tensors that {_INDEX} places there, "
                f"{min(missing)} among them. Download it again."
            )
    return shards


def _shard_keys(path: Path) -> list[str]:
    with open_shard(path) as shard:
        return list(shard.keys())


def open_shard(path: Path) -> Any:
    """Open a safetensors file.

    Raises:
        CheckpointError: The file is truncated or no safetensors file.
    """
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"The shard {path} can't be read ({error}). It may be truncated: download it again."
        ) from error


def fingerprint(folder: Path) -> str:
    """Return a hash that changes when the configuration or the weights do.

    Configuration and safetensors headers are hashed whole, the weights by 64 blocks of 64 KiB
    spread over each file: a full hash of a 30 GB checkpoint would take longer than its profile.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(header))
            step = max((size - 8 - header) // _SAMPLES, _SAMPLE_BYTES)
            for offset in range(8 + header, size, step):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class CheckpointReader:
    """Reads single parameters of `model` from the safetensors files in `folder`.

    Args:
        folder: The checkpoint.
        model: The model's structure; its weights are not used and may be meta tensors.

    Raises:
        CheckpointError: A file can't be read, or parameters have no source in the checkpoint.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder = folder
        self._shards = find_shards(folder)
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        self._model = model
        self._sources = self._map_sources()
        self._add_tied_names()
        missing = set(model.state_dict()) - set(self._sources)
        if missing:
            raise CheckpointError(
                f"The checkpoint {folder} lacks {len(missing)} weights that "
                f"{type(model).__name__} needs, {min(missing, key=dot_natural_key)} among them. "
                "Is it complete, and of the architecture that config.json names?"
            )

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the parameter `name` as a new tensor of `dtype` on the CPU."""
        source = self._sources[name]
        loads = [(pattern, key, functools.partial(self._load, key)) for pattern, key in source.keys]
        stored = self._tied.get(name, name)
        return self._convert(source, loads)[stored].to(dtype).contiguous()

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def _load(self, key: str) -> torch.Tensor:
        # Not mapped: a mapped shard keeps every page it has read until it is closed, and opening it
        # for each of many small tensors would take longer than reading them.
        path = self._shards[key]
        start, entries = self._header(path)
        entry = entries[key]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            with open_shard(path) as shard:
                return shard.get_tensor(key).clone()  # type: ignore[no-any-return]
        begin, end = entry["data_offsets"]
        data = torch.empty(end - begin, dtype=torch.uint8)
        try:
            with path.open("rb") as file:
                file.seek(start + begin)
                size = file.readinto(data.numpy().data)
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error}.") from error
        if size != end - begin:
            raise CheckpointError(
                f"Tensor {key} in {path} can't be read (it has {size} of {end - begin} bytes). "
                "Download it again."
            )
        return data.view(dtype).reshape(entry["shape"])

    def _header(self, path: Path) -> tuple[int, dict[str, Any]]:
        """Return where a safetensors file's data begin, and what it says of each tensor."""
        if path not in self._headers:
            try:
                with path.open("rb") as file:
                    size = int.from_bytes(file.read(8), "little")
                    self._headers[path] = 8 + size, json.loads(file.read(size))
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"The shard {path} can't be read ({error}). It may be truncated: download it "
                    "again."
                ) from error
        return self._headers[path]

    def _convert(
        self, source: _Source, loads: Sequence[tuple[str, str, Callable[[], torch.Tensor]]]
    ) -> dict[str, torch.Tensor]:
        if source.converter is None:
            return {source.first_target: loads[0][2]()}
        converter = copy.deepcopy(source.converter)
        for pattern, key, load in loads:
            converter.add_tensor(source.first_target, key, pattern, load)
        converted = converter.convert(
            source.first_target, model=self._model, config=self._model.config
        )
        return {
            name: value[0] if isinstance(value, list) else value
            for name, value in converted.items()
        }

    def _map_sources(self) -> dict[str, _Source]:
        """Mirror transformers' convert_and_load_state_dict_in_model, without loading anything."""
        transforms = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        by_pattern = {
            pattern: converter for converter in converters for pattern in converter.source_patterns
        }
        state = self._model.state_dict()
        prefix = self._model.base_model_prefix
        grouped: dict[str, list[tuple[str, str]]] = {}
        used: dict[str, WeightConverter | None] = {}
        for key in sorted(self._shards, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if target not in state and key in state:
                target, pattern = key, None
            if target in state:
                grouped.setdefault(target, []).append((pattern or key, key))
                used[target] = by_pattern[pattern] if pattern is not None else None
        sources: dict[str, _Source] = {}
        shapes = self._shapes()
        for first, keys in grouped.items():
            source = _Source(tuple(keys), used[first], first)
            metas = [
                (pattern, key, functools.partial(torch.empty, shapes[key], device="meta"))
                for pattern, key in keys
            ]
            for name, value in self._convert(source, metas).items():
                if name not in state or value.shape != state[name].shape:
                    expected = tuple(state[name].shape) if name in state else "no such weight"
                    raise CheckpointError(
                        f"The checkpoint's {keys[0][1]} gives {name} the shape "
                        f"{tuple(value.shape)}, config.json asks for {expected}. "
                        "Weights and config.json don't belong together."
                    )
                sources[name] = source
        return sources

    def _add_tied_names(self) -> None:
        """Let every name of a shared parameter be read; checkpoints store only one of them."""
        self._tied: dict[str, str] = {}
        for group in parameter_names(self._model):
            stored = [name for name in group if name in self._sources]
            for name in group if stored else ():
                if name not in self._sources:
                    self._tied[name] = stored[0]
                    self._sources[name] = self._sources[stored[0]]

    def _shapes(self) -> dict[str, list[int]]:
        shapes: dict[str, list[int]] = {}
        for path in sorted(set(self._shards.values())):
            with open_shard(path) as shard:
                for key in shard.keys():  # noqa: SIM118 (a safetensors file, not a dict)
                    shapes[key] = shard.get_slice(key).get_shape()
        return shapes
