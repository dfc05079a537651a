"""The weights of a program on disk, and from there in it: none is in memory that isn't used.

They are read, fused, cast and corrected one by one while a file beside the artifact is written, by
the same writer as an ONNX artifact's, which goes on where a killed compile stopped. The program
maps that file, and torch copies from it into its own format.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from alloc_moe.compiler.correction.folding import Change, changed_weights
from alloc_moe.compiler.export.graph import read_numpy
from alloc_moe.compiler.package.output import write_graph
from alloc_moe.compiler.package.paths import data_path
from alloc_moe.passes.base import add_initializer, lazy_tensor

if TYPE_CHECKING:
    from alloc_moe.compiler.model.checkpoint import Checkpoint
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.programs.capture import Captured
    from alloc_moe.compiler.records import Correction
    from alloc_moe.runtime.console import Console

_TYPES = {torch.float32: ir.DataType.FLOAT, torch.bfloat16: ir.DataType.BFLOAT16}


def mapped_weights(
    captured: Captured,
    moe: MoeModel,
    corrections: Sequence[Correction | None],
    path: Path,
    console: Console,
) -> dict[str, torch.Tensor]:
    """Return the state of a program by name, in the data of `path`, to which it is written first.

    At `path` itself there is a graph that has nothing else: torch replaces it by the artifact.

    Raises:
        OutputError: The disk is full or fails.
    """
    empty = ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="weights")
    model = ir.Model(empty, ir_version=10)
    shared = _lazy_weights(captured, moe.checkpoint, changed_weights(moe, corrections))
    for tensor in shared.values():
        add_initializer(model, tensor)
    write_graph(model, path, moe, list(corrections), console)
    saved = {name: v.const_value for name, v in ir.load(path).graph.initializers.items()}
    data = data_path(path)
    state = {}
    for name, own in captured.program.state_dict.items():
        owner = captured.owners[name]
        state[name] = _mapped(saved[owner], data, own) if owner in saved else own
    return state


def _lazy_weights(
    captured: Captured,
    checkpoint: Checkpoint,
    changes: Mapping[str, Change],
) -> dict[str, ir.LazyTensor]:
    """Return the weights that the checkpoint or a correction has, shared ones once."""
    lazy = {}
    for name, value in captured.program.state_dict.items():
        parameter, owner = captured.parameters[name], captured.owners[name]
        if owner in lazy:
            continue
        change = changes.get(parameter)
        stored = parameter in checkpoint.reader
        if value.dtype not in _TYPES or not (stored or change):
            continue
        dtype = _TYPES[value.dtype]
        read = functools.partial(read_numpy, checkpoint.reader.read, parameter, value.dtype)
        make = functools.partial(_changed, read if stored else None, change, dtype.numpy())
        lazy[owner] = lazy_tensor(make, tuple(value.shape), dtype, owner)
    return lazy


def _changed(
    read: Callable[[], np.ndarray] | None,
    change: Change | None,
    dtype: np.dtype,
) -> np.ndarray:
    weights = None if read is None else read()
    if change is None:
        assert weights is not None
        return weights
    return change(None if weights is None else weights.astype(np.float32)).astype(dtype)


def _mapped(tensor: ir.TensorProtocol | None, data: Path, own: torch.Tensor) -> torch.Tensor:
    """Return a weight as torch has it, in the memory of the file; small ones are in the graph."""
    assert tensor is not None
    if isinstance(tensor, ir.ExternalTensor):
        assert tensor.length is not None
        flat: np.ndarray = np.memmap(data, np.uint8, "c", tensor.offset or 0, (tensor.length,))
    else:
        flat = np.frombuffer(bytearray(tensor.tobytes()), np.uint8)
    value = torch.from_numpy(flat).view(own.dtype).reshape(own.shape)
    if isinstance(own, torch.nn.Parameter):
        return torch.nn.Parameter(value, requires_grad=False)
    return value
