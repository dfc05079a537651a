"""A model's weights -> safetensors files, under the names that its checkpoint on the hub has.

Weights are read, changed and cast a decoder layer at a time. What a layer's become is known before
any is read, and so are the files; each is written at once, and a killed compile goes on behind the
last that is complete.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from alloc_moe.compiler.checkpoints.tensors import write_tensors
from alloc_moe.compiler.correction.folding import changed_weights
from alloc_moe.compiler.model.files.headers import read_header
from alloc_moe.compiler.model.quiet import quiet
from alloc_moe.compiler.package.paths import shard_name
from alloc_moe.compiler.package.weights import save_whole, source_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alloc_moe.compiler.correction.folding import Change
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Correction
    from alloc_moe.runtime.console import Console

SHARD_BYTES = 1 << 30
"""Files end with the decoder layer that makes them as large."""

_LAYER = re.compile(r".*?\.\d+\.")  # model.layers.3.


@dataclass(frozen=True)
class _Weights:
    """Names of parameters and buffers that are converted together, and the bytes they take."""

    names: tuple[str, ...]
    nbytes: int


def write_shards(
    folder: Path,
    moe: MoeModel,
    corrections: Sequence[Correction | None],
    dtype: torch.dtype,
    console: Console,
) -> list[str]:
    """Write the model's weights into a folder, corrections folded in; return the files' names.

    Args:
        folder: Where to.
        moe: The model, whose checkpoint is read.
        corrections: What its experts are changed by, per MoE layer.
        dtype: What parameters are cast to. Buffers, such as a router's biases, stay as they are.
        console: Where progress is told.

    Raises:
        OutputError: The disk is full or fails.
    """
    changes = changed_weights(moe, corrections)
    shards = _shards(_converted_together(moe.checkpoint.skeleton, dtype))
    names = [shard_name(index, len(shards)) for index in range(len(shards))]
    key = source_key(moe, [str(dtype), shards, list(corrections)])
    total = sum(part.nbytes for shard in shards for part in shard)
    with console.progress("Writing weights", total, unit="bytes") as progress:
        for name, shard in zip(names, shards, strict=True):
            save = functools.partial(_save, moe, shard, dtype, changes)
            save_whole(folder / name, f"{key}:{name}", save)
            progress.advance(sum(part.nbytes for part in shard))
    return names


def index_of(folder: Path, names: Sequence[str]) -> str:
    """Return what says in which of a folder's files each tensor is, as JSON."""
    headers = {name: read_header(folder / name) for name in names}
    placed = {key: name for name, tensors in headers.items() for key in tensors}
    sizes = (t.end - t.begin for tensors in headers.values() for t in tensors.values())
    index = {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": {key: placed[key] for key in sorted(placed, key=dot_natural_key)},
    }
    return json.dumps(index, indent=2) + "\n"


def _converted_together(model: PreTrainedModel, dtype: torch.dtype) -> list[_Weights]:
    """Return what a decoder layer has at a time, and all else one by one, shared ones once."""
    parameters = dict(model.named_parameters())
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(parameters)
    groups: dict[str, list[str]] = {}
    nbytes: dict[str, int] = {}
    for name, value in model.state_dict().items():
        if name in shared:
            continue
        match = _LAYER.match(name)
        group = match[0] if match else name
        groups.setdefault(group, []).append(name)
        size = dtype.itemsize if name in parameters else value.element_size()
        nbytes[group] = nbytes.get(group, 0) + value.numel() * size
    return [_Weights(tuple(names), nbytes[group]) for group, names in groups.items()]


def _shards(parts: Iterable[_Weights]) -> list[list[_Weights]]:
    shards: list[list[_Weights]] = [[]]
    for part in parts:
        if sum(other.nbytes for other in shards[-1]) >= SHARD_BYTES:
            shards.append([])
        shards[-1].append(part)
    return shards


def _save(
    moe: MoeModel,
    shard: Sequence[_Weights],
    dtype: torch.dtype,
    changes: Mapping[str, Change],
    path: Path,
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for part in shard:
        weights = {name: _weight(moe, name, dtype, changes.get(name)) for name in part.names}
        with quiet():
            stored = revert_weight_conversion(moe.checkpoint.skeleton, weights)
        tensors |= stored
    write_tensors(tensors, path)


def _weight(moe: MoeModel, name: str, dtype: torch.dtype, change: Change | None) -> torch.Tensor:
    checkpoint = moe.checkpoint
    owner, _, leaf = name.rpartition(".")
    own = getattr(checkpoint.skeleton.get_submodule(owner), leaf)
    if not isinstance(own, torch.nn.Parameter):
        return checkpoint.reader.read(name, own.dtype)
    weight = checkpoint.reader.read(name, torch.float32 if change else dtype)
    return weight if change is None else torch.from_numpy(change(weight.numpy())).to(dtype)
