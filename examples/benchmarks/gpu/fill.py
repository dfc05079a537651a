"""Random weights for graphs without them, made where they are run."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_POOL = (1 << 24) + 3  # numbers to repeat: not a multiple of any row, so that rows differ
_HALF = {"FLOAT16", "BFLOAT16"}
_SIZES = {"FLOAT": 4, "FLOAT16": 2, "BFLOAT16": 2}


def fill(description: dict[str, Any], graphs: Path, folder: Path) -> dict[str, Path]:
    """Write a model's data into a folder and its graphs beside them, unless they are there.

    Args:
        description: What make.py wrote of the model.
        graphs: Where its graphs are.
        folder: Where to write; it needs room for all of the data.

    Returns:
        Where each plan's graph is.
    """
    data, plans = description["data"], description["plans"]
    paths = {plan: folder / entry["file"] for plan, entry in plans.items()}
    if all(path.exists() for path in paths.values()):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / data["file"]).open("wb") as file, _pool() as threads:
        file.truncate(max(data["bytes"], 1))
        pools = Pools()
        wanted = [(tensor, pools.of(tensor)) for tensor in data["tensors"]]
        jobs = [
            threads.submit(_write, file.fileno(), tensor, pool, number * 65537)
            for number, (tensor, pool) in enumerate(wanted)
        ]
        for job in jobs:
            job.result()
    for path in paths.values():
        shutil.copyfile(graphs / path.name, path)
    return paths


class Pools:
    """Random numbers in the bytes of a type, by what a weight shall be."""

    def __init__(self, size: int = _POOL) -> None:
        self._random = np.random.default_rng(0)
        self._normal = self._random.standard_normal(size, dtype=np.float32)
        self._even = self._random.random(size, dtype=np.float32)
        self._made: dict[tuple[Any, ...], NDArray[np.uint8]] = {}

    def of(self, tensor: dict[str, Any]) -> NDArray[np.uint8]:
        """Return bytes to repeat for a weight."""
        key = tuple(tensor.get(name) for name in ("type", "std", "low", "high"))
        if key not in self._made:
            self._made[key] = self._make(tensor)
        return self._made[key]

    def _make(self, tensor: dict[str, Any]) -> NDArray[np.uint8]:
        if tensor["type"] not in _SIZES:
            return np.frombuffer(self._random.bytes(len(self._normal)), np.uint8)
        if "std" in tensor:
            values = self._normal * np.float32(tensor["std"])
        else:
            low, high = tensor["low"], tensor["high"]
            values = self._even * np.float32(high - low) + np.float32(low)
        if tensor["type"] == "FLOAT16":
            return values.astype(np.float16).view(np.uint8)
        if tensor["type"] == "BFLOAT16":  # the upper half of a float32
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.view(np.uint8)


def _write(file: int, tensor: dict[str, Any], pool: NDArray[np.uint8], begin: int) -> None:
    """Write one weight, from somewhere in its pool on, in whole elements."""
    size = _SIZES.get(tensor["type"], 1)
    start, at, end = begin * size % len(pool), tensor["offset"], tensor["offset"] + tensor["bytes"]
    while at < end:
        piece = pool[start : start + end - at]
        at += os.pwrite(file, piece.data, at)
        start = 0 if start + len(piece) >= len(pool) else start + len(piece)


def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))
