"""Data that are not those the graph was compiled with are found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from alloc_moe.runtime.artifact.checking import check_all
from alloc_moe.runtime.artifact.digest import (
    SEAL_BYTES,
    BlockHasher,
    DataDigest,
    damaged_block,
    difference,
    to_json,
)
from alloc_moe.runtime.artifact.files import find_artifact
from alloc_moe.runtime.artifact.plan import DATA_KEY
from alloc_moe.runtime.commands.alloc_inspect import inspect_command
from alloc_moe.runtime.errors import ArtifactError
from alloc_moe.runtime.execution.session import open_session


def seal(data: Path) -> DataDigest:
    """Write the seal behind what a file holds, and return its digest."""
    content = data.read_bytes()
    hasher = BlockHasher(len(content))
    for start in range(0, len(content), 1000):
        hasher.update(content[start : start + 1000])
    with data.open("r+b") as file:
        digest = hasher.digest(file)
        file.seek(0, os.SEEK_END)
        file.write(digest.seal())
    return digest


@pytest.fixture
def bound(toy: Path, tmp_path: Path) -> Path:
    """A bare artifact, bound to its data."""
    folder = tmp_path / "bound"
    shutil.copytree(toy.parent, folder)
    graph = folder / "out.onnx"
    model = ir.load(graph)
    model.metadata_props[DATA_KEY] = to_json({"out.onnx.data": seal(folder / "out.onnx.data")})
    ir.save(model, graph)
    return graph


def inspect(*arguments: str | Path) -> Result:
    return CliRunner().invoke(inspect_command, list(map(str, arguments)))


def logits(path: Path, *, counting: bool = False) -> np.ndarray:
    session = open_session(path, ep="cpu", threads=1, count_activations=counting)
    return session.run(np.array([[1, 2, 3]])).logits


@pytest.mark.parametrize("size", [0, 1, 5000, 1 << 20, (3 << 20) + 7])
def test_every_block_is_checked(tmp_path: Path, size: int) -> None:
    data = tmp_path / "data"
    data.write_bytes(np.random.default_rng(0).bytes(size))
    digest = seal(data)
    assert (difference(data, digest), damaged_block(data, digest)) == (None, None)
    assert data.stat().st_size == size + SEAL_BYTES
    for place in {0, size // 2, size - 1} if size else ():
        content = bytearray(data.read_bytes())
        content[place] ^= 1
        (tmp_path / "damaged").write_bytes(content)
        assert damaged_block(tmp_path / "damaged", digest) == place >> 20


def test_a_large_hole_is_found_by_the_samples(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(np.random.default_rng(0).bytes(8 << 20))
    digest = seal(data)
    with data.open("r+b") as file:
        file.seek(3_000_001)
        file.write(bytes(200_000))
    assert difference(data, digest) == "it was changed or damaged"


def test_there_are_few_blocks_of_large_files() -> None:
    assert BlockHasher(30 << 30).block == 64 << 20
    assert len(to_json({"x": DataDigest(30 << 30, 64 << 20, "0" * 64, ("0" * 32,) * 480)})) < 20_000


def test_another_compiles_data_are_refused_at_load(bound: Path) -> None:
    data = bound.parent / "out.onnx.data"
    content = bytearray(data.read_bytes())
    # Whatever the samples see: a file with another seal is another compile's.
    content[-1] ^= 1
    data.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"isn't what out\.onnx .*seal is that of another"):
        open_session(bound, ep="cpu")
    data.write_bytes(content + b"x")
    with pytest.raises(ArtifactError, match=r"it has \d+ bytes, not \d+"):
        open_session(bound, ep="cpu")


@pytest.mark.parametrize("counting", [False, True])
def test_copies_links_and_renames_of_the_pair_work(
    bound: Path, tmp_path: Path, counting: bool
) -> None:
    expected = logits(bound)
    data = bound.parent / "out.onnx.data"
    places = {name: tmp_path / name / "out.onnx" for name in ("copied", "links", "hub", "alone")}
    for place in places.values():
        place.parent.mkdir()
    shutil.copy(bound, places["copied"])
    shutil.copy(data, places["copied"].parent)
    places["links"].symlink_to(bound)
    (places["links"].parent / data.name).symlink_to(data)
    places["alone"].symlink_to(bound)  # the data lie beside what it leads to
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for source, blob in ((bound, "0a"), (data, "0b")):
        shutil.copy(source, blobs / blob)
        (places["hub"].parent / source.name).symlink_to(Path("..") / "blobs" / blob)
    places["renamed"] = shutil.copy(bound, tmp_path / "renamed.onnx")
    shutil.copy(data, tmp_path / "renamed.onnx.data")
    places["graph alone renamed"] = bound.rename(bound.parent / "other.onnx")
    for name, place in places.items():
        if name in ("links", "alone"):
            place.unlink()
            place.symlink_to(bound.parent / "other.onnx")
        np.testing.assert_array_equal(logits(place, counting=counting), expected, err_msg=name)
        assert check_all(find_artifact(place)) == {data.name: data.stat().st_size - SEAL_BYTES}


def test_a_renamed_pair_is_not_mixed_with_another(bound: Path, tmp_path: Path) -> None:
    shutil.copy(bound, tmp_path / "renamed.onnx")
    (tmp_path / "renamed.onnx.data").write_bytes(
        bytes((bound.parent / "out.onnx.data").stat().st_size)
    )
    with pytest.raises(ArtifactError, match="seal is that of another compile"):
        open_session(tmp_path / "renamed.onnx", ep="cpu")


@pytest.mark.parametrize("name", ["/etc/passwd", "../out.onnx.data", "a/../../x"])
def test_weights_outside_of_the_folder_are_refused(toy: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    shutil.copy(toy.parent / "out.onnx.data", tmp_path)
    model = ir.load(toy)
    for value in model.graph.initializers.values():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                name,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name,
            )
    ir.save(model, folder / "out.onnx")
    with pytest.raises(ArtifactError, match=r"outside of its folder\. Don't run it"):
        open_session(folder / "out.onnx", ep="cpu")


def test_check_says_that_all_is_well(bound: Path) -> None:
    outcome = inspect(bound, "--check")
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert outcome.stdout.count("\n") == 1
    assert "the data are as compiled: out.onnx.data" in outcome.stdout
    size = (bound.parent / "out.onnx.data").stat().st_size - SEAL_BYTES
    data = json.loads(inspect(bound, "--check", "--json").stdout)
    assert data == {"artifact": str(bound), "checked": {"out.onnx.data": size}}
    assert "out.onnx.data, " in inspect(bound).stdout


def test_check_names_the_file_and_the_block(bound: Path) -> None:
    data = bound.parent / "out.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    outcome = inspect(bound, "--check")
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert outcome.stderr.count("\n") == 1
    assert f"{data} is damaged, or belongs to another artifact: block 0 of 1" in outcome.stderr


def test_an_artifact_without_a_digest_loads_with_a_note(toy: Path) -> None:
    logits(toy)
    assert "without a digest" in inspect(toy).stderr
    outcome = inspect(toy, "--check")
    assert outcome.exit_code == 1
    assert "has no digest of out.onnx.data" in outcome.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda digest: "x", "can't be read: it is no JSON"),
        (lambda digest: digest.replace('"size": ', '"size": -'), r"size is -\d+, where a whole"),
        (lambda digest: digest.replace('"size": ', '"size": 999999'), "don't make up"),
    ],
)
def test_a_damaged_digest_is_reported(
    bound: Path, change: Callable[[str], str], message: str
) -> None:
    model = ir.load(bound)
    model.metadata_props[DATA_KEY] = change(model.metadata_props[DATA_KEY])
    ir.save(model, bound)
    with pytest.raises(ArtifactError, match=message):
        open_session(bound, ep="cpu")


def test_data_that_a_graph_names_otherwise_are_checked_too(bound: Path) -> None:
    """While an artifact is replaced, the old graph names its data otherwise."""
    model = ir.load(bound)
    (bound.parent / "out.onnx.data").rename(bound.parent / "aside")
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                "aside",
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                base_dir=bound.parent,
            )
    proto = ir.to_proto(model)
    bound.write_bytes(proto.SerializeToString())
    files = find_artifact(bound)
    assert files.check_data() == {"aside": bound.parent / "aside"}
    data = bytearray((bound.parent / "aside").read_bytes())
    data[0] ^= 1
    (bound.parent / "aside").write_bytes(data)
    with pytest.raises(ArtifactError, match="it was changed or damaged"):
        files.check_data()
