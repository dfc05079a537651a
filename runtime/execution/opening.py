"""What a session is opened with: a graph that was looked at, kernels of our own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime

from alloc_moe.runtime.artifact.counting import counted_values
from alloc_moe.runtime.artifact.files import ArtifactFiles
from alloc_moe.runtime.artifact.onnx_file import with_data_names, with_outputs
from alloc_moe.runtime.artifact.plan import PADDING_KEY
from alloc_moe.runtime.errors import ArtifactError, GenerationError
from alloc_moe.runtime.execution.buffers import FLOAT
from alloc_moe.runtime.execution.providers import utf8_path
from alloc_moe.runtime.execution.slots import CacheSlot, is_past, present_name
from alloc_moe.runtime.execution.step_programs.kernels import OwnKernels, open_kernels

logger = logging.getLogger(__name__)


def own_kernels(
    files: ArtifactFiles, data: Mapping[str, Path], options: onnxruntime.SessionOptions
) -> OwnKernels | None:
    """Return what decodes on the GPU by itself; a session of these options has the same weights."""
    if PADDING_KEY not in files.onnx.metadata:
        return None
    kernels = open_kernels(files, data)
    if isinstance(kernels, str):
        logger.info("onnxruntime decodes, without own kernels: %s.", kernels)
        return None
    kernels.share(options)
    return kernels


def session_model(
    files: ArtifactFiles, data: Mapping[str, Path], *, counting: bool
) -> tuple[str | bytes, Path | None]:
    """Return the graph's path, or its content where that must change and where its data are."""
    graph = files.graph
    in_place = all(path == graph.parent / name for name, path in data.items())
    if in_place and not counting:
        return utf8_path(graph), None
    content = graph.read_bytes()
    if counting:
        content = with_outputs(content, counted_values(files))
    # onnxruntime follows no link out of the folder that it is told, as those of the hub's cache.
    real = {name: path.resolve() for name, path in data.items()}
    folders = {path.parent for path in real.values()} or {graph.parent}
    names = {name: path.name for name, path in real.items() if path.name != name}
    if names and len(folders) == 1:
        content = with_data_names(content, names)
    return content, folders.pop() if len(folders) == 1 else graph.parent


def check_io(inputs: set[str], outputs: set[str], *, path: Path) -> None:
    """Raise ArtifactError unless the graph has the I/O of a causal language model."""
    known = {"input_ids", "attention_mask", "position_ids"}
    lacking = {"input_ids", "attention_mask", "logits"} - inputs - outputs
    extra = {name for name in inputs if name not in known and not is_past(name)}
    unpaired = {name for name in inputs if is_past(name) and present_name(name) not in outputs}
    for problem, names in (("lacks", lacking), ("needs", extra), ("never updates", unpaired)):
        if names:
            raise ArtifactError(
                f"{path} {problem} {', '.join(sorted(names))}, which this version can't handle. "
                "Update alloc-moe, or compile the model again."
            )


def check_past(slots: Sequence[CacheSlot], *, path: Path) -> None:
    """Raise GenerationError if onnxruntime would read a past on the GPU wrongly.

    It has attention in float32 on the CPU only. That gets a copy of the cache's buffer, and takes
    all of its columns as past: it appends in place only where input and output are one buffer.
    """
    if any(slot.element_type == FLOAT for slot in slots):
        raise GenerationError(
            f"onnxruntime can't go on from a past in float32 on CUDA, which {path} needs for this "
            "call. Compile it with --dtype float16, or run it with --ep cpu."
        )
