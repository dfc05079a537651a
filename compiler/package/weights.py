"""An artifact's weights on disk, written so that a killed compile goes on where it was.

The weights lie one after another in the order of the graph, as `onnx_ir.save` puts them, so where
each begins is known before the first is made. A journal beside the file says how much of it is
surely on disk, and by a key what it was made of: with any other key nothing of it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import onnx_ir as ir

from alloc_moe.compiler.errors import OutputError
from alloc_moe.compiler.workspace.files import create, save_text, sync
from alloc_moe.compiler.workspace.results import digest_of
from alloc_moe.runtime.artifact.digest import BlockHasher, DataDigest, pieces, to_json
from alloc_moe.runtime.artifact.plan import DATA_KEY
from alloc_moe.runtime.artifact.shapes import ShapeError, read_json, record, string, whole

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel

_INLINE = 256  # up to so many bytes a weight is in the graph itself
_COMMIT_BYTES = 256 << 20
_COMMIT_SECONDS = 5.0
_JOURNAL = ".journal"
_WRITTEN = record({"key": string(), "bytes": whole(0)})
_SOURCES = ("compiler", "passes")


def weights_key(graph: ir.Model, moe: MoeModel, inputs: Sequence[object]) -> str:
    """Return a digest of all that the bytes of a graph's weights depend on.

    That is the graph with every shape, type and offset and the plan in its metadata, weights that
    are in memory by their values, and for those that are made when they are written what
    `source_key` says.

    Args:
        graph: As it will be saved.
        moe: The model it was made of.
        inputs: What its passes were given besides: records, arrays, numbers.
    """
    with _placed(graph, Path("weights")) as weights:
        proto = ir.to_proto(graph).SerializeToString(deterministic=True)
    values = [tensor.tobytes() for tensor, _ in weights if not isinstance(tensor, ir.LazyTensor)]
    return source_key(moe, [proto, values, *inputs])


def source_key(moe: MoeModel, inputs: Sequence[object]) -> str:
    """Return a digest of all that weights depend on which are made of a model.

    That is its checkpoint, how it is quantised, this package's code and `inputs`.
    """
    files = moe.checkpoint.reader.weights.files
    shards = [
        (files.name(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files.paths
    ]
    numpy = importlib.metadata.version("numpy")
    return digest_of([shards, moe.fingerprint, moe.quantization, numpy, _code(), list(inputs)])


def _code() -> str:
    """Return a digest of the code that makes weights: a clone changes under one version."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[2]
    for path in sorted(file for name in _SOURCES for file in (package / name).rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def written_bytes(data: Path, key: str) -> int:
    """Return how much of the file at `data` is surely what a compile with this key writes."""
    try:
        journal = read_json(_journal(data), _WRITTEN)
        size = data.stat().st_size
    except (OSError, ShapeError):
        return 0
    return int(journal["bytes"]) if journal["key"] == key and size >= journal["bytes"] else 0


def resumable_files(folder: Path) -> set[Path]:
    """Return the files in `folder` that a later compile can go on from."""
    journals = list(folder.glob(f"*{_JOURNAL}"))
    pairs = [(journal.with_suffix(""), journal) for journal in journals]
    return {file for pair in pairs if all(map(_is_file, pair)) for file in pair}


def _is_file(path: Path) -> bool:
    """Whether it is a file itself: what a link leads to is none that a compile wrote."""
    return path.is_file() and not path.is_symlink()


def drop_journals(folder: Path) -> None:
    """Let no later compile go on from what is in `folder`."""
    for journal in folder.glob(f"*{_JOURNAL}"):
        journal.unlink()


def save_whole(data: Path, key: str, save: Callable[[Path], None]) -> None:
    """Let a file of weights be written at once, unless a compile with this key has done so.

    Args:
        data: The file.
        key: A digest of all that its bytes depend on.
        save: Writes it. Raises OSError if it can't.

    Raises:
        OutputError: The disk is full or fails.
    """
    if written_bytes(data, key):
        return
    with _explained(data, key):
        _journal(data).unlink(missing_ok=True)
        sync(data.parent)
        save(data)
        sync(data)
        _note(data, key, data.stat().st_size)


def _note(data: Path, key: str, size: int) -> None:
    journal = json.dumps({"key": key, "bytes": size})
    save_text(journal, _journal(data), what="How far the weights are written")


def _journal(data: Path) -> Path:
    return data.with_name(f"{data.name}{_JOURNAL}")


def save_with_weights(
    graph: ir.Model,
    path: Path,
    data: Path,
    *,
    advance: Callable[[int], None] | None = None,
    key: str | None = None,
) -> None:
    """Write an .onnx file and the file of its weights, one lazy weight in memory at a time.

    With a key it begins after what `written_bytes` finds, whose weights are not made again, and
    keeps a journal for the next; `drop_journals` removes it. The file's digest goes into the
    graph's metadata, and its seal is the end of the file.

    Args:
        graph: The model. None of its weights may be read from `data` itself.
        path: The .onnx file.
        data: The file for weights, in the same folder.
        advance: Called with the bytes of each weight when it is written.
        key: The graph's `weights_key`.

    Raises:
        OutputError: The disk is full or fails.
    """
    with _placed(graph, data) as weights:
        with _Writer(data, key, sum(place.nbytes for _, place in weights)) as writer:
            for tensor, place in weights:
                end = (place.offset or 0) + place.nbytes
                if end > writer.end:
                    writer.append(tensor, end)
                    if advance is not None:
                        advance(place.nbytes)
            digest = writer.seal()
        graph.metadata_props[DATA_KEY] = to_json({data.name: digest})
        try:
            with _explained(path, key):
                ir.save(graph, path)
        finally:
            del graph.metadata_props[DATA_KEY]  # the graph may be saved again with other weights


class _Writer:
    """Appends weights to a file, after those that are there, and keeps its journal."""

    def __init__(self, data: Path, key: str | None, size: int) -> None:
        self._data, self._key = data, key
        self._hasher = BlockHasher(size)
        self.end = self._committed = written_bytes(data, key) if key else 0
        self._last_commit = time.monotonic()

    def __enter__(self) -> _Writer:
        with _explained(self._data, self._key):
            if not self.end:
                # A journal must never speak of a file that is written anew.
                _journal(self._data).unlink(missing_ok=True)
                sync(self._data.parent)
            self._out = self._open()
        return self

    def _open(self) -> BinaryIO:
        file = self._data.open("r+b") if self.end else create(self._data)
        for piece in pieces(file, self.end):
            self._hasher.update(piece)
        file.truncate(self.end)
        file.seek(self.end)
        return file

    def append(self, tensor: ir.TensorProtocol, end: int) -> None:
        """Write a weight, which takes the file to `end`."""
        # Made first, so that an OSError from here on is the output's.
        made = tensor.raw() if isinstance(tensor, ir.LazyTensor) else tensor
        with _explained(self._data, self._key):
            stored = _stored(made)
            self._out.write(stored)
            self._hasher.update(stored)
            if self._out.tell() != end:
                raise RuntimeError(f"{tensor.name} ends at {self._out.tell()}, not at {end}.")
            self.end = end
            late = time.monotonic() - self._last_commit >= _COMMIT_SECONDS
            if late or end - self._committed >= _COMMIT_BYTES:
                self._commit()

    def seal(self) -> DataDigest:
        """Write what binds the file to its graph behind the last weight, and return its digest."""
        with _explained(self._data, self._key):
            self._commit()
            digest = self._hasher.digest(self._out)
            self._out.seek(self.end)
            self._out.write(digest.seal())
        return digest

    def _commit(self) -> None:
        self._out.flush()
        if self._key is None or self.end == self._committed:
            return
        os.fsync(self._out.fileno())
        _note(self._data, self._key, self.end)
        self._committed, self._last_commit = self.end, time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with _explained(self._data, self._key), self._out:
            if kind is None:
                self._commit()


def _stored(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """Return what a file holds of a tensor, where possible without a copy.

    Not by `tofile`: numpy's says nothing if the last bytes of an array find no space.
    """
    if tensor.dtype.bitwidth < 8 or sys.byteorder == "big":
        return tensor.tobytes()
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _placed(
    graph: ir.Model, data: Path
) -> Iterator[list[tuple[ir.TensorProtocol, ir.ExternalTensor]]]:
    """Let the graph's weights lie in a file while the block lasts; yield them with their places."""
    values = [
        value
        for part in graph.graphs()
        for value in part.initializers.values()
        if value.const_value is not None and _outside(value.const_value)
    ]
    given = [value.const_value for value in values if value.const_value is not None]
    ends = list(itertools.accumulate((tensor.nbytes for tensor in given), initial=0))
    places = [_place(*each, data) for each in zip(given, ends[:-1], strict=True)]
    try:
        for value, place in zip(values, places, strict=True):
            value.const_value = place
        yield list(zip(given, places, strict=True))
    finally:
        for value, tensor in zip(values, given, strict=True):
            value.const_value = tensor


def _outside(tensor: ir.TensorProtocol) -> bool:
    return tensor.nbytes > _INLINE or isinstance(tensor, ir.ExternalTensor)


def _place(tensor: ir.TensorProtocol, offset: int, data: Path) -> ir.ExternalTensor:
    assert tensor.name is not None
    assert isinstance(tensor.shape, ir.Shape)
    return ir.ExternalTensor(
        data.name,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=data.parent,
    )


@contextlib.contextmanager
def _explained(data: Path, key: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(data.parent).free / 2**30
        then = "; the same command then goes on where it stopped" if key else ""
        raise OutputError(
            f"{data} can't be written, with {free:.2f} GiB free: {error.strerror or error}. "
            f"Free some space{then}."
        ) from error
