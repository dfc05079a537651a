"""The header parser on damaged and hostile files: it ends soon, in a result or one sentence."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc_moe.runtime.artifact.onnx_file import read_onnx_file, with_data_names, with_outputs
from alloc_moe.runtime.errors import ArtifactError

SECONDS = 20.0


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def field(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def read(path: Path, content: bytes) -> None:
    """Read a file of this content, or be refused in one sentence."""
    path.write_bytes(content)
    start = time.process_time()
    try:
        read_onnx_file(path)
    except ArtifactError as error:
        assert "\n" not in str(error)  # noqa: PT017
    assert time.process_time() - start < SECONDS


# A message of the fields that the parser looks into, at any depth, with any numbers.
MESSAGES = st.recursive(
    st.binary(max_size=8) | st.sampled_from([b"\xff" * 12, b"location", b"offset", b"9" * 5000]),
    lambda inner: st.lists(
        st.tuples(st.sampled_from([1, 2, 5, 7, 12, 13, 14]), inner), max_size=4
    ).map(lambda parts: b"".join(field(number, body) for number, body in parts)),
    max_leaves=12,
)


@settings(settings.get_profile("fuzz"))
@given(content=MESSAGES | st.binary(max_size=64))
def test_made_up_messages(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    read(tmp_path_factory.getbasetemp() / "made_up.onnx", content)


@settings(settings.get_profile("fuzz"))
@given(st.data())
def test_damaged_graphs(
    toy_graph: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(toy_graph.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        cut = data.draw(st.sampled_from([0, 0, 1, 7, 1000]))
        content[start : start + cut] = data.draw(st.binary(max_size=12))
    read(tmp_path_factory.getbasetemp() / "damaged.onnx", bytes(content))


@settings(settings.get_profile("fuzz"))
@given(st.text(min_size=1, max_size=40))
def test_other_names_for_the_data_change_nothing_else(toy_graph: Path, name: str) -> None:
    import onnx

    content = toy_graph.read_bytes()
    given_names = {"out.onnx.data": name}
    changed = onnx.ModelProto.FromString(with_data_names(content, given_names))
    for tensor in changed.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                assert entry.value == name
                entry.value = "out.onnx.data"
    assert changed == onnx.ModelProto.FromString(content)
    assert with_data_names(content, {"another": name}) == content


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 3_000_000,
        varint(7 << 3 | 2) + b"\xff" * 3_000_000,
        field(7, b"\xff" * 3_000_000),
        field(7, field(5, field(13, field(1, b"offset") + field(2, b"9" * 2_000_000)))),
        field(7, b"\x08\x01" * 1_600_000),
        field(7, field(1, b"")) * 100_000,
        varint(7 << 3 | 2) + varint(2**62),
        varint(7 << 3 | 1),
        b"",
    ],
    ids=[
        *("varints", "length", "in the graph", "digits", "fields", "graphs", "size", "end"),
        "nothing",
    ],
)
def test_hostile_files_end_soon(tmp_path: Path, content: bytes) -> None:
    read(tmp_path / "hostile.onnx", content)


def test_a_varint_of_ten_bytes_is_the_longest(tmp_path: Path) -> None:
    graph = field(7, b"")
    longest = varint(3 << 3) + b"\xff" * 9 + b"\x01"
    read_onnx_file_of = tmp_path / "out.onnx"
    read_onnx_file_of.write_bytes(graph + longest)
    read_onnx_file(read_onnx_file_of)
    read_onnx_file_of.write_bytes(graph + varint(3 << 3) + b"\xff" * 10 + b"\x01")
    with pytest.raises(ArtifactError, match="no ONNX file, or a damaged one"):
        read_onnx_file(read_onnx_file_of)


def test_outputs_are_added_to_any_graph(toy_graph: Path, tmp_path: Path) -> None:
    (tmp_path / "more.onnx").write_bytes(with_outputs(toy_graph.read_bytes(), ["hidden1"]))
    assert read_onnx_file(tmp_path / "more.onnx") == read_onnx_file(toy_graph)
