"""ONNX files read and extended without the onnx package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from alloc_moe.runtime.artifact.files import find_artifact
from alloc_moe.runtime.artifact.onnx_file import read_onnx_file, with_outputs
from alloc_moe.runtime.artifact.plan import PLAN_KEY
from alloc_moe.runtime.errors import ArtifactError


def test_what_is_read_is_what_onnx_reads(toy: Path) -> None:
    found = read_onnx_file(toy)
    proto = onnx.load(toy, load_external_data=False)
    assert found.metadata == {entry.key: entry.value for entry in proto.metadata_props}
    assert found.node_outputs == {name for node in proto.graph.node for name in node.output}
    assert found.data_files == {"out.onnx.data": (toy.parent / "out.onnx.data").stat().st_size}
    assert PLAN_KEY in found.metadata


def test_a_model_without_external_data_needs_no_files(tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) { y = Neg(x) }'
    )
    ir.save(model, tmp_path / "plain.onnx")
    found = read_onnx_file(tmp_path / "plain.onnx")
    assert (found.metadata, found.data_files, found.node_outputs) == ({}, {}, {"y"})


def test_an_inner_value_becomes_an_output_of_unchanged_numbers(tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (float[n] y)'
        " { inner = Neg(x)\n half = Cast<to=10>(inner)\n y = Neg(inner) }"
    )
    ir.save(model, tmp_path / "plain.onnx")
    extended = with_outputs((tmp_path / "plain.onnx").read_bytes(), ["inner", "half"])
    onnx.checker.check_model(extended[: len((tmp_path / "plain.onnx").read_bytes())])
    session = onnxruntime.InferenceSession(extended, providers=["CPUExecutionProvider"])
    y, inner, half = session.run(None, {"x": np.array([1, 2], np.float32)})
    assert [y.tolist(), inner.tolist(), half.tolist()] == [[1, 2], [-1, -2], [-1, -2]]
    assert half.dtype == np.float16


@pytest.mark.parametrize("path", ["a\0b.onnx", Path("a\0/b"), "a\ud800.pt"])
def test_what_no_file_can_be_called_is_reported(path: str | Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"^'.*' is no artifact: no file can be called so\.$"
    ) as e:
        find_artifact(path)
    assert str(e.value).isprintable()


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no file .*gone\.onnx"):
        read_onnx_file(tmp_path / "gone.onnx")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no protobuf at all",
        b"\x00" * 100,
        b"\x08\x0a",  # a message, but without a graph
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a field longer than the file
        b"\xff" * 40,  # a number that never ends
        b"\x3a\x05\x0a\x03\x12\x01\xff",  # a value's name that is no text
    ],
)
def test_what_is_no_model_is_reported(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"bad\.onnx is no ONNX file, or a damaged one"):
        read_onnx_file(tmp_path / "bad.onnx")


def test_every_truncation_is_reported_or_read(toy: Path, tmp_path: Path) -> None:
    content = toy.read_bytes()
    for size in range(0, len(content), 37):
        (tmp_path / "cut.onnx").write_bytes(content[:size])
        try:
            read_onnx_file(tmp_path / "cut.onnx")
        except ArtifactError:
            continue


def test_a_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="can't be read"):
        read_onnx_file(tmp_path)
