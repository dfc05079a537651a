"""Small graphs run in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


@pytest.fixture(scope="session")
def session() -> Callable[[ir.Model], onnxruntime.InferenceSession]:
    """Return a function that loads a graph on the CPU."""

    def load(model: ir.Model) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        content = ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    return load


@pytest.fixture(scope="session")
def run(
    session: Callable[[ir.Model], onnxruntime.InferenceSession],
) -> Callable[[ir.Model, Arrays], list[NDArray[Any]]]:
    """Return a function from a graph and its inputs, in any order, to its outputs."""

    def run(model: ir.Model, inputs: Arrays) -> list[NDArray[Any]]:
        outputs: list[NDArray[Any]] = session(model).run(None, dict(inputs))
        return outputs

    return run


@pytest.fixture
def rng() -> np.random.Generator:
    """Return the same random numbers for every test."""
    return np.random.default_rng(0)
