"""Initializers read without the onnx package."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from alloc_moe.runtime.artifact.tensors import from_bfloat16, read_initializers, to_bfloat16
from alloc_moe.runtime.errors import ArtifactError

ARRAYS = {
    "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
    "halves": np.linspace(-2, 2, 600, dtype=np.float16).reshape(30, 20),
    "bytes": np.arange(256, dtype=np.uint8),
    "brains": np.linspace(-3, 3, 500).astype(ml_dtypes.bfloat16),
}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Return a graph whose larger tensors are in a file of their own."""
    tensors = [ir.tensor(array, name=name) for name, array in ARRAYS.items()]
    values = [ir.Value(name=tensor.name, const_value=tensor) for tensor in tensors]
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=values, name="g"), ir_version=10)
    path = tmp_path / "graph.onnx"
    ir.save(model, path, external_data="graph.data", size_threshold_bytes=100)
    return path


def test_values_are_those_written(graph: Path) -> None:
    found = read_initializers(graph, {"graph.data": graph.with_name("graph.data")}, set(ARRAYS))
    for name, array in ARRAYS.items():
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name].floats(), array.astype(np.float32))
    assert found["brains"].values.dtype == np.uint16
    assert isinstance(found["halves"].values, np.memmap)


def test_one_that_is_missing_is_named(graph: Path) -> None:
    data = {"graph.data": graph.with_name("graph.data")}
    with pytest.raises(ArtifactError, match="has no weight lost"):
        read_initializers(graph, data, {"lost", "floats"})


def test_values_beyond_the_end_of_their_file_are_refused(graph: Path) -> None:
    data = graph.with_name("graph.data")
    data.write_bytes(data.read_bytes()[:300])
    with pytest.raises(ArtifactError, match=r"weights of .*graph\.onnx can't be read: "):
        read_initializers(graph, {"graph.data": data}, set(ARRAYS))


def test_numbers_become_the_nearest_in_bfloat16_and_of_two_the_even_one() -> None:
    step = np.float32(2.0**-7)  # of numbers from 1 on
    given = np.array([1, 1 + step / 4, 1 + step / 2, 1 + 3 * step / 2, -2, 0], np.float32)
    expected = np.array([1, 1, 1, 1 + 2 * step, -2, 0], np.float32)
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(given)), expected)
