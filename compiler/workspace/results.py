"""What took long to compute, kept in files while a compile lasts: after a kill none is repeated.

With a model whose layers are read when they run, a pass over the calibration text takes minutes,
and a plan takes dozens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from alloc_moe.compiler.workspace.files import load_tensors, save_tensors
from alloc_moe.compiler.workspace.folders import claim, is_ours, remove

# What a kill leaves while safetensors writes has a name of its own.
_OURS = re.compile(r"[0-9a-f]{32}\.safetensors|\.tmp\w+")


def results_path(output: Path) -> Path:
    """Return where what makes `output` keeps what it computed, until that is there."""
    return output.absolute().with_name(f".{output.name}.passes")


class SavedResults:
    """Tensors by all that they were computed from.

    Args:
        folder: Where they are kept; None keeps nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    @property
    def keeps(self) -> bool:
        """Whether anything is kept."""
        return self._folder is not None

    def beside(self, name: str) -> Path | None:
        """Return a folder of that name for what is kept by other means, if anything is kept."""
        return self._folder and self._folder.with_name(f"{self._folder.name}.{name}")

    def recall(
        self, inputs: Sequence[object], compute: Callable[[], Iterable[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """Return what `compute` gave for equal `inputs` earlier, else compute and keep it."""
        found = self.find(inputs)
        if found is None:
            found = list(compute())
            self.keep(inputs, found)
        return found

    def find(self, inputs: Sequence[object]) -> list[torch.Tensor] | None:
        """Return what was kept for equal `inputs`, if anything was."""
        if self._folder is None or not is_ours(self._folder):
            return None
        with contextlib.suppress(OSError, SafetensorError):
            return load_tensors(self._path(inputs))
        return None

    def keep(self, inputs: Sequence[object], tensors: Sequence[torch.Tensor]) -> None:
        """Keep tensors until `delete`."""
        if self._folder is None:
            return
        claim(self._folder)
        path = self._path(inputs)
        then = "choose an output on another disk"
        save_tensors(tensors, path, what="What was measured", then=then)

    def forget(self, inputs: Sequence[object]) -> None:
        """Drop what was kept for `inputs`."""
        if self._folder is not None and is_ours(self._folder):
            with contextlib.suppress(OSError):  # it takes space, and does no harm
                self._path(inputs).unlink()

    def delete(self) -> None:
        """Drop everything."""
        if self._folder is not None:
            remove(self._folder, _OURS)

    def _path(self, inputs: Sequence[object]) -> Path:
        assert self._folder is not None
        return self._folder / f"{digest_of(inputs)[:32]}.safetensors"


class NamedResults:
    """Lists of tensors by name: in files where `results` keeps any, else in memory.

    Args:
        results: Where they are kept.
        inputs: What all of them were computed from.
    """

    def __init__(self, results: SavedResults, inputs: Sequence[object]) -> None:
        self._results, self._inputs = results, list(inputs)
        self._memory: dict[str, list[torch.Tensor]] = {}

    def keep(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        """Keep tensors under a name."""
        if self._results.keeps:
            self._results.keep([*self._inputs, name], tensors)
        else:
            self._memory[name] = list(tensors)

    def find(self, name: str) -> list[torch.Tensor] | None:
        """Return what was kept under a name, by an earlier process too, if anything was."""
        if not self._results.keeps:
            return self._memory.get(name)
        return self._results.find([*self._inputs, name])

    def digest(self, names: Iterable[str]) -> str:
        """Return a digest of what is kept under some names."""
        return digest_of([digest_of([name, self.find(name)]) for name in sorted(names)])


def digest_of(inputs: Sequence[object]) -> str:
    """Return a digest of tensors, arrays, records and what else has a telling `repr`."""
    digest = hashlib.sha256()
    _update(digest, inputs)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, value: object) -> None:
    """Hash a value: arrays by their bytes, as their text leaves most of them out."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _update(digest, [getattr(value, field.name) for field in dataclasses.fields(value)])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for each in value:
            _update(digest, each)
    else:
        digest.update(repr(value).encode() + b",")
