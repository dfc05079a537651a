"""Where an artifact goes, and the names of what lies there or is made beside it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from alloc_moe.compiler.workspace.results import results_path
from alloc_moe.compiler.workspace.unfinished import whole_name
from alloc_moe.runtime.artifact.plan import MODEL_FILE
from alloc_moe.runtime.artifact.torch_file import EXPORT, SCRIPT

_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_MADE_BESIDE = re.compile(r"\.?(?P<file>.+?)(\.journal)?")


@dataclass(frozen=True)
class Output:
    """Where an artifact goes: `path` is a folder if `bundle`, else a file.

    With `is_checkpoint` the folder is one in the Hugging Face layout.
    """

    path: Path
    bundle: bool
    is_checkpoint: bool = False

    @property
    def graph_name(self) -> str:
        """The graph's file name inside its folder."""
        return MODEL_FILE if self.bundle else self.path.name

    @property
    def is_program(self) -> bool:
        """Whether the artifact is one of TorchScript or torch.export, and none of ONNX."""
        return not self.bundle and self.path.suffix in (SCRIPT, EXPORT)

    @property
    def place(self) -> Path:
        """What is replaced: the path, or the folder that it leads to as a link."""
        path = self.path.absolute()
        return path.resolve() if self.bundle and path.is_symlink() else path

    @property
    def profile_path(self) -> Path:
        """Where the sensitivity profile of a compile is kept unless the user says."""
        return self.path.with_name(f"{self.path.name}.profile.json")

    @property
    def results_path(self) -> Path:
        """Where a compile keeps what its passes found, until there is the artifact."""
        return results_path(self.path)


def shard_name(index: int, count: int) -> str:
    """Return what the Hugging Face layout calls a file of weights, counted from 0."""
    return f"model-{index + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"


def belongs_to_shard(name: str) -> bool:
    """Whether a file of that name holds a checkpoint's weights, or is made while they are."""
    made = _MADE_BESIDE.fullmatch(whole_name(name))
    return made is not None and _SHARD.fullmatch(made["file"]) is not None


def data_path(graph: Path) -> Path:
    """Return the external data file of an .onnx file."""
    return graph.with_name(f"{graph.name}.data")


def staging_path(output: Output) -> Path:
    """Return the folder in which the artifact is made: beside it, so on the same file system."""
    return output.place.with_name(f".{output.place.name}.partial")
