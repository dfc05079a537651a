"""Graphs without the data of their weights, and what these are filled with where the graphs run.

A machine with a GPU may be reached by little more than a wire: graphs are small, weights aren't.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

_INLINE = 256  # bytes up to which a weight is in the graph itself
_ALIGNED = 4096
_PIECE = 1 << 24  # values that are made at a time
_STEPS = {4: 0.02 / 4.6, 8: 0.02 / 74}  # scales of bits that give weights of that deviation
_TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
}


@dataclass(frozen=True)
class Weight:
    """Where a weight lies in the file of weights, and what it is filled with.

    ``deviation`` is that of normal numbers; ``constant`` fills instead where it is given. Bytes are
    uniform.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    deviation: float
    constant: float | None = None


def save_without_data(graphs: Mapping[Path, ir.Model]) -> Path:
    """Write graphs that share one file of weights, which isn't written, and the list of these.

    Returns:
        The list's path: a JSON object of the file's name and its weights.
    """
    first = next(iter(graphs))
    data = f"{first.name}.data"
    placed: dict[str, Weight] = {}
    end = 0
    for path, model in graphs.items():
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes <= _INLINE or ".rotary." in name:
                continue
            if name not in placed:
                placed[name] = _weight(name, tensor, end)
                end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
            value.const_value = ir.ExternalTensor(
                data,
                placed[name].offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir=path.parent,
            )
        ir.save(model, path)
    listing = first.with_name(f"{first.name}.weights.json")
    content = {"file": data, "nbytes": end, "weights": [asdict(w) for w in placed.values()]}
    listing.write_text(json.dumps(content))
    return listing


def _weight(name: str, tensor: ir.TensorProtocol, offset: int) -> Weight:
    shape = tuple(int(size) for size in tensor.shape.numpy())
    dtype = {"FLOAT": "float32"}.get(tensor.dtype.name, tensor.dtype.name.lower())
    constant = 1.0 if len(shape) == 1 else None  # of a norm
    if name.endswith(".scales"):
        constant = _STEPS[4 if ".int4" in name else 8]
    deviation = 0.06 if ".gate." in name else 0.02  # routers as decisive as trained ones
    return Weight(name, dtype, shape, offset, tensor.nbytes, deviation, constant)


def fill(listing: Path, *, seed: int = 0) -> None:
    """Write the file of weights, from one pool of random numbers: fast, and the same every time."""
    content = json.loads(listing.read_text())
    random = np.random.default_rng(seed)
    normal = random.standard_normal(_PIECE + 3, np.float32)
    uniform = random.integers(0, 256, _PIECE + 3, np.uint8)
    with listing.with_name(content["file"]).open("wb") as file:
        for number, fields in enumerate(content["weights"]):
            weight = Weight(**fields)
            file.seek(weight.offset)
            left = weight.nbytes // _TYPES[weight.dtype].itemsize
            pool = _pool(weight, normal, uniform)
            start = number * 65537 % (_PIECE // 2)
            while left:
                piece = pool[start : start + left]
                file.write(piece.tobytes())
                left, start = left - len(piece), 0
        file.truncate(content["nbytes"])


def _pool(weight: Weight, normal: NDArray[np.float32], uniform: NDArray[np.uint8]) -> NDArray[Any]:
    if weight.dtype == "uint8":
        return uniform
    if weight.constant is None:
        values = normal * np.float32(weight.deviation)
    else:
        values = np.full_like(normal, weight.constant)
    if weight.dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(_TYPES[weight.dtype])


if __name__ == "__main__":
    import sys

    fill(Path(sys.argv[1]))
