"""Which files of a checkpoint are read: decided here, for the reader, transformers and hashes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from alloc_moe.compiler.errors import CheckpointError
from alloc_moe.compiler.model.files.headers import StoredTensor, header_bytes, read_header
from alloc_moe.compiler.model.files.json_files import read_json_object, regular_size, shown

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CHOICE = "transformers_weights"
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a checkpoint, in the order of their names, and what is in them."""

    folder: Path
    paths: tuple[Path, ...]
    tensors: dict[str, StoredTensor]

    def name(self, path: Path) -> str:
        """Return the name of a file within the folder."""
        return path.relative_to(self.folder).as_posix()


def find_weight_files(folder: Path, settings: dict[str, Any]) -> WeightFiles:
    """Return the files that transformers would load, whatever else lies beside them.

    That is what `settings` name in ``transformers_weights``, else model.safetensors, else the
    shards that model.safetensors.index.json names; of a tensor that is in two, the last.

    Args:
        folder: The checkpoint.
        settings: What its config.json holds.

    Raises:
        CheckpointError: No safetensors weights, a shard is missing, or one can't be read.
    """
    named = settings.get(_CHOICE)
    if named is not None:
        first = _inside(folder, named, said_by=f"{_CHOICE} in {CONFIG}")
    else:
        both = folder / SINGLE, folder / INDEX
        # One that is no file is passed over as transformers does, and told if there is no other.
        first = next(
            (path for found in (Path.is_file, os.path.lexists) for path in both if found(path)),
            folder,
        )
        if first == folder:
            raise CheckpointError(_why_no_weights(folder))
    if first.name.endswith(".safetensors"):
        return WeightFiles(folder, (first,), read_header(first))
    if first.name.endswith(".safetensors.index.json"):
        return _indexed(folder, first)
    raise CheckpointError(
        f"{_CHOICE} in {folder / CONFIG} is {shown(named)}, which is no .safetensors file and no "
        ".safetensors.index.json. Name one, or remove the entry."
    )


def _indexed(folder: Path, index: Path) -> WeightFiles:
    placed = read_json_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(
            f"{index} is no safetensors index: its weight_map is {shown(placed)}. Download it "
            "again."
        )
    names = {
        key: _inside(folder, name, said_by=f"the place of {shown(key)} in {index.name}")
        for key, name in placed.items()
    }
    tensors: dict[str, StoredTensor] = {}
    paths = tuple(sorted(set(names.values()), key=lambda path: path.relative_to(folder).as_posix()))
    for path in paths:
        if not path.exists():
            raise CheckpointError(
                f"Shard {path.relative_to(folder).as_posix()} is named in {index.name} but missing "
                f"in {folder}. Download it again."
            )
        found = read_header(path)
        missing = {key for key, place in names.items() if place == path} - found.keys()
        if missing:
            raise CheckpointError(
                f"Shard {path} lacks {len(missing)} tensors that {index.name} places there, "
                f"{min(missing)} among them. Download it again."
            )
        tensors.update(found)
    return WeightFiles(folder, paths, tensors)


def _inside(folder: Path, name: object, *, said_by: str) -> Path:
    """Return the path of a file that a JSON file names, which must lie in the folder."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or parts[0] == "/" or ".." in parts or "\\" in str(name) or "\0" in str(name):
        raise CheckpointError(
            f"{said_by} is {shown(name)}, which names no file inside of {folder}. Download the "
            "checkpoint again."
        )
    return folder.joinpath(*parts)


def _why_no_weights(folder: Path) -> str:
    names = sorted(entry.name for entry in os.scandir(folder))
    other = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    found = f"only {', '.join(other[:3])}, which may run code when read" if other else "none"
    return (
        f"{folder} has no safetensors weights ({SINGLE} or {INDEX}); found {found}. "
        "Save the model with save_pretrained of transformers 5, which writes safetensors."
    )


def fingerprint(files: WeightFiles) -> str:
    """Return a hash that changes when the configuration or the weights do.

    Configuration and safetensors headers are hashed whole, the weights by 64 blocks of 64 KiB
    spread over each file: a full hash of a 30 GB checkpoint would take longer than its profile.
    Only files that are read count, and none other is opened.

    Raises:
        CheckpointError: A file can't be read.
    """
    config = files.folder / CONFIG
    regular_size(config)
    try:
        digest = hashlib.sha256(config.read_bytes())
        for path in files.paths:
            size = path.stat().st_size
            start = header_bytes(path)
            digest.update(f"{files.name(path)}:{size}".encode())
            with path.open("rb") as file:
                file.seek(8)
                digest.update(file.read(start - 8))
                step = max((size - start) // _SAMPLES, _SAMPLE_BYTES)
                for offset in range(start, size, step):
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{files.folder} can't be read: {error}.") from error
    return digest.hexdigest()
