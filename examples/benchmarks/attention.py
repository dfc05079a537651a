"""Time decode steps of a stack of attention layers: the standard operator and GroupQueryAttention.

    python examples/benchmarks/attention.py --layers 16 --pasts 128,4096

Every variant is a graph of its own with nothing but attention in it, run in turns with the others.
"shared" binds the cache's input and output to one buffer, "copied" lets the graph write a new one.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnxruntime import OrtValue


@dataclass(frozen=True)
class Shape:
    """Of one layer's attention: query heads, key/value heads, size of a head, layers."""

    heads: int
    kv_heads: int
    head_size: int
    layers: int


@dataclass(frozen=True)
class Variant:
    """One way to attend."""

    grouped: bool
    cache: str
    shared: bool

    def __str__(self) -> str:
        operator = "GroupQueryAttention" if self.grouped else "Attention"
        return f"{operator}, {self.cache}, {'shared' if self.shared else 'copied'}"


VARIANTS = (
    Variant(False, "float32", False),
    Variant(True, "float32", False),
    Variant(True, "float32", True),
    Variant(True, "int8 per tensor", True),
    Variant(True, "int8 per channel", True),
)


def stack(shape: Shape, variant: Variant) -> ir.Model:
    """Return the graph: the output of a layer is the query of the next."""
    width = shape.heads * shape.head_size
    kv_width = shape.kv_heads * shape.head_size
    floats = ir.DataType.FLOAT
    cache_type = floats if variant.cache == "float32" else ir.DataType.INT8
    query = ir.val("query", floats, ["b", "s", width])
    key = ir.val("key", floats, ["b", "s", kv_width])
    value = ir.val("value", floats, ["b", "s", kv_width])
    bias = ir.val("bias", floats, ["b", 1, "s", "t"])
    last = ir.val("last", ir.DataType.INT32, ["b"])
    total = ir.val("total", ir.DataType.INT32, [])
    inputs = [query, key, value, bias, *([last, total] if variant.grouped else [])]
    outputs, nodes, initializers = [], [], []
    per_channel = variant.cache == "int8 per channel"
    for layer in range(shape.layers):
        sizes = ["b", shape.kv_heads, "p", shape.head_size]
        past = [ir.val(f"past.{layer}.{kind}", cache_type, sizes) for kind in "kv"]
        present = [ir.val(f"present.{layer}.{kind}", cache_type, sizes[:2] + ["q", sizes[3]]) for kind in "kv"]
        inputs += past
        if variant.grouped:
            scales = []
            attributes = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
            if variant.cache != "float32":
                kind = "PER_CHANNEL" if per_channel else "PER_TENSOR"
                attributes |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8}
                size = [1, shape.kv_heads, 1, shape.head_size] if per_channel else [1]
                tensor = ir.tensor(np.full(size, 4 / 127, np.float32), name=f"scale.{layer}")
                scale = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(floats), shape=tensor.shape)
                initializers.append(scale)
                scales = [scale, scale]
            node = ir.node(
                "GroupQueryAttention",
                [query, key, value, *past, last, total, None, None, None, bias, None, *scales][: None if scales else 11],
                domain="com.microsoft", num_outputs=3, attributes=attributes,
            )
            query, *written = node.outputs
        else:
            node = ir.node(
                "Attention", [query, key, value, bias, *past], num_outputs=3,
                attributes={"q_num_heads": shape.heads, "kv_num_heads": shape.kv_heads},
            )
            query, *written = node.outputs
        for new, like in zip(written, present):
            new.name, new.type, new.shape = like.name, like.type, like.shape
        outputs += written
        nodes.append(node)
    query.name, query.type, query.shape = "output", ir.TensorType(floats), ir.Shape(["b", "s", width])
    graph = ir.Graph(inputs, [query, *outputs], nodes=nodes, initializers=initializers,
                     opset_imports={"": 23, "com.microsoft": 1}, name="stack")
    return ir.Model(graph, ir_version=10)


def prepare(shape: Shape, variant: Variant, past: int, threads: int, padded: bool=False) -> Callable[[], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(stack(shape, variant)).SerializeToString(), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    binding = session.io_binding()
    for name, heads in (("query", shape.heads), ("key", shape.kv_heads), ("value", shape.kv_heads)):
        binding.bind_cpu_input(name, random.normal(size=(1, 1, heads * shape.head_size)).astype(np.float32))
    binding.bind_cpu_input("bias", np.zeros((1, 1, 1, past + 1), np.float32))
    if variant.grouped:
        binding.bind_cpu_input("last", np.array([past], np.int32))
        binding.bind_cpu_input("total", np.array(past + 1, np.int32))
    dtype = np.float32 if variant.cache == "float32" else np.int8
    for layer in range(shape.layers):
        for kind in "kv":
            length = past + variant.shared
            array = random.normal(size=(1, shape.kv_heads, length, shape.head_size))
            cache = OrtValue.ortvalue_from_numpy((array if dtype == np.float32 else array * 32).astype(dtype))
            binding.bind_ortvalue_input(f"past.{layer}.{kind}", cache)
            if variant.shared:
                binding.bind_ortvalue_output(f"present.{layer}.{kind}", cache)
            else:
                binding.bind_output(f"present.{layer}.{kind}")
    binding.bind_output("output")
    return lambda: session.run_with_iobinding(binding)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--pasts", default="128,4096")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=30)
    a = parser.parse_args()
    shape = Shape(a.heads, a.kv_heads, a.head_size, a.layers)
    pasts = [int(p) for p in a.pasts.split(",")]
    runs = {(v, p): prepare(shape, v, p, a.threads) for v in VARIANTS for p in pasts}
    times = {k: [] for k in runs}
    for i in range(a.runs + 3):
        for k, run in runs.items():
            run()  # its own cache lines
            t = time.perf_counter(); run(); 
            if i >= 3: times[k].append(1e3 * (time.perf_counter() - t))
    for v in VARIANTS:
        print(f"{v!s:40}", *(f"{p}: {statistics.median(times[v, p]):8.3f} min {min(times[v,p]):8.3f} ms" for p in pasts))


main()
