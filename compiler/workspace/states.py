"""What enters a decoder layer, for all calibration windows: kept in files, to go on after a kill.

A profile that goes through the model layer by layer saves these states after each layer, and then,
in one step, how far it got.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from alloc_moe.compiler.workspace.files import (
    explained,
    has_tensors,
    load_tensors,
    save_tensors,
    save_text,
)
from alloc_moe.compiler.workspace.folders import claim, held, is_ours, remove
from alloc_moe.compiler.workspace.processes import Processes
from alloc_moe.compiler.workspace.results import SavedResults
from alloc_moe.runtime.artifact.shapes import (
    ShapeError,
    measured,
    one_of,
    read_json,
    record,
    rows,
    whole,
)

_PROGRESS = "progress.json"
_OURS = re.compile(r"progress\.json|(?:entering|gradient)-\d+-\d+of\d+\.safetensors|\.tmp\w+")


@dataclass(frozen=True)
class LayerProgress:
    """How far a profile got.

    Forward, the states that enter decoder layer `layer` are saved; backward, the gradients there.
    ``sums`` are of the layers passed, in rows as `LayerSums` has them; ``loss`` is known backward.
    """

    stage: Literal["forward", "backward"]
    layer: int
    loss: float
    sums: tuple[tuple[float, ...], ...]


_SAVED = record(
    {
        "identity": lambda value, _: value,  # only compared
        "stage": one_of("forward", "backward"),
        "layer": whole(0),
        "loss": measured,
        "sums": rows(rows(measured)),
    }
)


class LayerStates:
    """Lists of tensors by name, and the progress made with them.

    Args:
        folder: Where they are saved; None keeps them in memory.
        identity: What they belong to; those of another are deleted.
        processes: Each process saves its own tensors; one saves the progress.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any], processes: Processes) -> None:
        self._folder = folder
        self._processes = processes
        self._identity = {**json.loads(json.dumps(identity)), "processes": processes.size}
        self._memory: dict[str, list[torch.Tensor]] = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs from the folder: what one drops, another may be about to read.

        Raises:
            OutputError: Another run has it.
        """
        if self._folder is None or not self._processes.writes:
            yield
            return
        with held(self._folder, f"Another compile keeps its states in {self._folder}"):
            yield

    def progress(self) -> LayerProgress | None:
        """Return what an earlier run got to, if every process still has its states; else clear."""
        found = self._processes.broadcast(self._read_progress())
        usable = found is not None and self._readable(state_name(found.stage, found.layer))
        missing = self._processes.add(torch.tensor([float(not usable)], dtype=torch.float64))
        if found is not None and missing.item() == 0:
            return found
        if self._folder is not None:
            claim(self._folder)
            self.start_over()
        return None

    def start_over(self) -> None:
        """Forget how far an earlier run got."""
        if self._folder is not None and self._processes.writes:
            self._unlink(self._folder / _PROGRESS)

    def commit(self, progress: LayerProgress) -> None:
        """Save how far this run got; the states for that must have been saved by all processes."""
        if self._folder is not None and self._processes.writes:
            data = {"identity": self._identity, **dataclasses.asdict(progress)}
            save_text(json.dumps(data), self._folder / _PROGRESS, what="The profile's progress")

    def save(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        """Keep tensors under a name."""
        if self._folder is None:
            self._memory[name] = list(tensors)
            return
        then = "choose another path for the profile"
        save_tensors(tensors, self._path(name), what="The states of the profile", then=then)

    def load(self, name: str) -> list[torch.Tensor]:
        """Return the tensors that were saved under a name."""
        if self._folder is None:
            return self._memory[name]
        return load_tensors(self._path(name))

    def drop(self, name: str) -> None:
        """Forget the tensors of a name, if there are any."""
        self._memory.pop(name, None)
        if self._folder is not None:
            self._unlink(self._path(name))

    def delete(self) -> None:
        """Forget everything; each process does, as machines have disks of their own."""
        self._memory.clear()
        if self._folder is not None:
            remove(self._folder, _OURS)

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        rank, size = self._processes.rank, self._processes.size
        return self._folder / f"{name}-{rank + 1}of{size}.safetensors"

    def _unlink(self, path: Path) -> None:
        with explained("The states of the profile", path):
            path.unlink(missing_ok=True)

    def _readable(self, name: str) -> bool:
        folder = self._folder
        return folder is not None and is_ours(folder) and has_tensors(self._path(name))

    def _read_progress(self) -> LayerProgress | None:
        if self._folder is None or not self._processes.writes or not is_ours(self._folder):
            return None
        path = self._folder / _PROGRESS
        with contextlib.suppress(OSError, ShapeError):
            data = read_json(path, _SAVED)
            if data.pop("identity") == self._identity:
                return LayerProgress(**data)
        return None


def delete_kept(results: Path, *names: str) -> None:
    """Delete saved results, and states of these names beside them, of interrupted runs too."""
    saved = SavedResults(results)
    saved.delete()
    for name in names:
        if folder := saved.beside(name):
            remove(folder, _OURS)


def state_name(stage: str, layer: int) -> str:
    """Return the name of what is kept at a decoder layer."""
    return f"{'entering' if stage == 'forward' else 'gradient'}-{layer}"
