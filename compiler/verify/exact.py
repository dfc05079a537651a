"""Graphs whose quantised kernels compute exactly: what is compared with rounded PyTorch models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import onnx_ir as ir

from alloc_moe.compiler.workspace.files import explained

_EXACT_EXPERTS = "ORT_QMOE_CPU_QNBIT_GEMM"


@contextlib.contextmanager
def exact_copy(path: Path) -> Iterator[Path]:
    """Yield a copy of a quantised graph whose kernels don't round activations to 8 bits.

    It lies beside the graph, with which it shares its data, and is gone after the block. Load it
    inside: 8-bit experts take the exact path by an environment variable of onnxruntime only.
    """
    model = ir.load(path)
    keep_activations(model)
    copy = path.with_name(f".exact.{path.name}")
    with explained("A copy of the graph", copy, then="choose an output on another disk"):
        ir.save(model, copy)
    try:
        with mock.patch.dict(os.environ, {_EXACT_EXPERTS: "fp32"}):
            yield copy
    finally:
        copy.unlink()


def keep_activations(model: ir.Model) -> None:
    """Have a graph's products with weights in blocks not round activations to 8 bits.

    On CUDA they don't anyway.
    """
    for node in model.graph:
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
