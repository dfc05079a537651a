"""Weights on disk: the layout is onnx_ir's, and a killed compile goes on where it was."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from alloc_moe.compiler.errors import OutputError
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.package import weights as weights_file
from alloc_moe.compiler.package.weights import (
    drop_journals,
    resumable_files,
    save_with_weights,
    written_bytes,
)
from alloc_moe.passes.base import lazy_tensor
from alloc_moe.runtime.artifact.digest import SEAL_BYTES, damaged_block, read_digests
from alloc_moe.runtime.artifact.onnx_file import read_onnx_file

SIZES = (1000, 7, 300, 5000, 65, 2000)
"""Float32 weights of the small graph; that of 7 is in the graph itself."""

NAMES = [f"w{index}" for index in range(len(SIZES)) if index != 1]


class _StopError(Exception):
    """Stands for a kill."""


def small_graph(made: list[str], *, stop: str = "", seed: int = 0) -> ir.Model:
    """Return a graph of lazy weights that note in `made` when they are; at `stop` it ends."""
    values = []
    for index, size in enumerate(SIZES):
        name = f"w{index}"

        def compute(name: str = name, index: int = index, size: int = size) -> np.ndarray:
            if name == stop:
                raise _StopError
            made.append(name)
            return np.random.default_rng(seed + index).normal(size=size).astype(np.float32)

        tensor = lazy_tensor(compute, [size], ir.DataType.FLOAT, name)
        values.append(ir.val(name, ir.DataType.FLOAT, [size], const_value=tensor))
    node = ir.node("Concat", values, attributes={"axis": 0})
    [output] = node.outputs
    output.name, output.type = "y", ir.TensorType(ir.DataType.FLOAT)
    output.shape = ir.Shape([sum(SIZES)])
    graph = ir.Graph([], [output], nodes=[node], initializers=values, opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def commit_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_file, "_COMMIT_BYTES", 1)


def save(folder: Path, graph: ir.Model, *, key: str | None = None) -> list[int]:
    reported: list[int] = []
    path = folder / "out.onnx"
    save_with_weights(graph, path, package.data_path(path), advance=reported.append, key=key)
    return reported


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def unbound(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files without what binds them: the metadata's digest and the seal."""
    graph = onnx.ModelProto.FromString(files["out.onnx"])
    del graph.metadata_props[:]
    return {"graph": graph.SerializeToString(), "data": files["out.onnx.data"][:-SEAL_BYTES]}


def saved_by_onnx_ir(graph: ir.Model, folder: Path) -> dict[str, bytes]:
    ir.save(graph, folder / "out.onnx", external_data="out.onnx.data", max_workers=1)
    files = contents(folder)
    return unbound({**files, "out.onnx.data": files["out.onnx.data"] + bytes(SEAL_BYTES)})


# layout


def test_the_files_are_those_of_onnx_ir(tmp_path: Path) -> None:
    ours, theirs = in_folder(tmp_path / "ours"), in_folder(tmp_path / "theirs")
    graph = small_graph([])
    assert save(ours, graph) == [4 * size for size in SIZES if size != 7]
    assert all(isinstance(v.const_value, ir.LazyTensor) for v in graph.graph.initializers.values())
    assert unbound(contents(ours)) == saved_by_onnx_ir(graph, theirs)


@pytest.mark.parametrize("family", ["olmoe", "half"])
def test_the_files_of_a_model_are_those_of_onnx_ir(
    exported: Callable[[str], ir.Model], half_graph: ir.Model, tmp_path: Path, family: str
) -> None:
    graph = half_graph if family == "half" else exported(family)
    ours, theirs = in_folder(tmp_path / "ours"), in_folder(tmp_path / "theirs")
    save(ours, graph, key="key")
    drop_journals(ours)
    assert unbound(contents(ours)) == saved_by_onnx_ir(graph, theirs)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_onnxruntime_maps_weights_that_are_not_aligned(tmp_path: Path) -> None:
    values = []
    for name, size in (("odd", 1000), ("large", 1 << 20)):
        tensor = ir.Tensor(np.full(size, 3, np.float32), name=name)
        values.append(ir.val(name, ir.DataType.FLOAT, [size], const_value=tensor))
    node = ir.node("Concat", values, attributes={"axis": 0})
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape([1000 + (1 << 20)])
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21})
    save(tmp_path, ir.Model(graph, ir_version=10))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        tmp_path / "out.onnx", options, providers=["CPUExecutionProvider"]
    )
    assert str(tmp_path / "out.onnx.data") in Path("/proc/self/maps").read_text()
    (output,) = session.run(None, {})
    assert (output == 3).all()


# going on


@pytest.mark.usefixtures("commit_each")
@pytest.mark.parametrize("stop", NAMES)
def test_weights_that_are_written_are_not_made_again(tmp_path: Path, stop: str) -> None:
    whole, parts = in_folder(tmp_path / "whole"), in_folder(tmp_path / "parts")
    save(whole, small_graph([]))
    with pytest.raises(_StopError):
        save(parts, small_graph([], stop=stop), key="key")
    with (parts / "out.onnx.data").open("ab") as file:
        file.write(b"of a weight that was cut off")
    left = NAMES[NAMES.index(stop) :]
    made: list[str] = []
    reported = save(parts, small_graph(made), key="key")
    assert [name for name in made if name != "w1"] == left
    assert len(reported) == len(left)
    drop_journals(parts)
    assert contents(parts) == contents(whole)  # the digest too, of bytes that were there already
    digests = read_digests(read_onnx_file(parts / "out.onnx").metadata, graph=parts)
    assert damaged_block(parts / "out.onnx.data", digests["out.onnx.data"]) is None


def test_only_what_was_committed_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_file, "_COMMIT_BYTES", 4 * 5000)
    with pytest.raises(_StopError):
        save(tmp_path, small_graph([], stop="w4"), key="key")
    assert written_bytes(tmp_path / "out.onnx.data", "key") == 4 * (1000 + 300 + 5000)
    with pytest.raises(_StopError):
        save(tmp_path, small_graph([], stop="w5"), key="key")
    assert written_bytes(tmp_path / "out.onnx.data", "key") == 4 * (1000 + 300 + 5000)


def test_time_commits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_file, "_COMMIT_SECONDS", 0.0)
    with pytest.raises(_StopError):
        save(tmp_path, small_graph([], stop="w2"), key="key")
    assert written_bytes(tmp_path / "out.onnx.data", "key") == 4 * 1000


def test_all_that_is_written_is_on_disk_before_the_journal_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync, save_text = os.fsync, weights_file.save_text
    monkeypatch.setattr(os, "fsync", lambda f: (synced.append(os.fstat(f).st_size), fsync(f)))

    def check(text: str, path: Path, *, what: str) -> None:
        assert synced[-1] == json.loads(text)["bytes"]
        save_text(text, path, what=what)

    monkeypatch.setattr(weights_file, "save_text", check)
    save(tmp_path, small_graph([]), key="key")
    assert 4 * sum(SIZES) - 28 in synced


@pytest.mark.usefixtures("commit_each")
def test_weights_of_another_key_are_not_used(tmp_path: Path) -> None:
    with pytest.raises(_StopError):
        save(tmp_path, small_graph([], stop="w4", seed=1), key="other")
    # The second is stopped before it has written anything, and nothing of the first is left.
    with pytest.raises(_StopError):
        save(tmp_path, small_graph([], stop="w0"), key="key")
    assert written_bytes(tmp_path / "out.onnx.data", "other") == 0
    made: list[str] = []
    save(tmp_path, small_graph(made), key="key")
    assert set(made) >= set(NAMES)


@pytest.mark.usefixtures("commit_each")
@pytest.mark.parametrize("damage", ["data gone", "data short", "journal", "no journal"])
def test_what_is_damaged_is_written_anew(tmp_path: Path, damage: str) -> None:
    save(tmp_path, small_graph([]), key="key")
    whole = contents(tmp_path)
    data, journal = tmp_path / "out.onnx.data", tmp_path / "out.onnx.data.journal"
    if damage == "data gone":
        data.unlink()
    elif damage == "data short":
        data.write_bytes(whole[data.name][: -SEAL_BYTES - 1])
    elif damage == "journal":
        journal.write_text('{"key": "key"}')
    else:
        journal.unlink()
    made: list[str] = []
    save(tmp_path, small_graph(made), key="key")
    assert set(made) >= set(NAMES)
    assert contents(tmp_path) == whole


@pytest.mark.usefixtures("commit_each")
def test_a_full_disk_is_reported_and_keeps_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = weights_file._stored

    def full(tensor: ir.TensorProtocol) -> bytes | memoryview:
        if tensor.name == "w3":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stored(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(weights_file, "_stored", full)
        with pytest.raises(
            OutputError,
            match=rf"{re.escape(str(tmp_path))}.*\.data can't be written, with \d+\.\d\d GiB free: "
            r"No space left on device\. Free some space; the same command then goes on",
        ):
            save(tmp_path, small_graph([]), key="key")
    made: list[str] = []
    save(tmp_path, small_graph(made), key="key")
    assert made == ["w3", "w4", "w5", "w1"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of file sizes")
@pytest.mark.parametrize("weight", ["w0", "w2", "w3", "w5"])
def test_a_file_that_ends_early_is_never_taken_for_whole(tmp_path: Path, weight: str) -> None:
    import resource

    place = NAMES.index(weight)
    sizes = [4 * size for size in SIZES if size != 7]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sum(sizes[:place]) + sizes[place] - 4, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"\.data can't be written.*Free some space\."):
            save(tmp_path, small_graph([]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out.onnx").exists()


def test_an_error_of_the_source_is_none_of_the_output(tmp_path: Path) -> None:
    graph = small_graph([])

    def fail() -> np.ndarray:
        raise OSError(errno.EIO, "the checkpoint can't be read")

    graph.graph.initializers["w2"].const_value = lazy_tensor(fail, [300], ir.DataType.FLOAT, "w2")
    with pytest.raises(OSError, match="the checkpoint can't be read"):
        save(tmp_path, graph, key="key")


def test_only_files_with_a_journal_are_resumable(tmp_path: Path) -> None:
    save(tmp_path, small_graph([]), key="key")
    names = {"out.onnx.data", "out.onnx.data.journal"}
    assert {path.name for path in resumable_files(tmp_path)} == names
    drop_journals(tmp_path)
    assert resumable_files(tmp_path) == set()


# the key
