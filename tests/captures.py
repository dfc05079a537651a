"""Graphs that are captured once in a run of the tests, by whichever process needs them first."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from filelock import FileLock

from alloc_moe.compiler.export import graph as export

if TYPE_CHECKING:
    from alloc_moe.compiler.export.graph import ReadWeight
    from alloc_moe.compiler.model.checkpoint import Checkpoint

capture = export.export_graph

# Where a checkpoint lies and how its weights are stored doesn't show in a graph.
OF_FILES = ("_name_or_path", "architectures", "dtype", "quantization_config")


class Captures:
    """Stands for ``export_graph``: what it gives depends on all that the graph is made from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(
        self, checkpoint: Checkpoint, *, dtype: str = "float32", read: ReadWeight | None = None
    ) -> ir.Model:
        read = read or checkpoint.reader.read
        path = self._folder / f"{_digest(checkpoint, dtype, read)}.onnx"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                captured = capture(checkpoint, dtype=dtype, read=read)
                ir.save(_without_weights(captured), path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
        graph = ir.load(path)
        export._bind_weights(graph, checkpoint.reader, read, *export._DTYPES[dtype])
        return graph


def _digest(checkpoint: Checkpoint, dtype: str, read: ReadWeight) -> str:
    """Return a digest of the configuration, and of the weights that the optimizer sees."""
    skeleton = checkpoint.skeleton
    settings: dict[str, Any] = checkpoint.config.to_dict()
    settings = {name: value for name, value in settings.items() if name not in OF_FILES}
    kind = f"{type(skeleton).__module__}.{type(skeleton).__qualname__}"
    found = hashlib.sha256(json.dumps([kind, dtype, settings], sort_keys=True).encode())
    for name, tensor in (*skeleton.named_parameters(), *skeleton.named_buffers()):
        if name in checkpoint.reader and tensor.ndim < 2 and tensor.numel() <= export._SMALL:
            found.update(name.encode() + read(name, torch.float32).numpy().tobytes())
    return found.hexdigest()


def _without_weights(graph: ir.Model) -> ir.Model:
    """Name the weights that are read lazily instead of holding them: they are bound again."""
    for name, value in graph.graph.initializers.items():
        lazy = value.const_value
        if isinstance(lazy, ir.LazyTensor):
            value.const_value = ir.ExternalTensor(
                "", 0, 0, lazy.dtype, shape=lazy.shape, name=name, base_dir=""
            )
    return graph
