"""Attention alone: the standard operator against GroupQueryAttention, decode or prefill.

Each way to attend is a graph of nothing but attention layers, each fed with the one before. All are
run in turns, with caches of several lengths. "copied" lets the graph write a new cache at every
step, "shared" binds the cache's input and output to one buffer, as the runtime does.

    python examples/benchmarks/speed/attention.py --layers 16 --past 128 --past 4096
    python examples/benchmarks/speed/attention.py --sequence 512 --past 0
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
from onnxruntime import OrtValue

from alloc_moe.runtime.execution.providers import create_session, session_options

SLOTS = ("key", "value")


@dataclass(frozen=True)
class Shape:
    """Layers, their heads for queries and for keys and values, and the size of a head."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int

    def cache(self, batch: int | str, length: int | str) -> list[int | str]:
        """Return the shape of one layer's keys or values."""
        return [batch, self.kv_heads, length, self.head_size]


@dataclass(frozen=True)
class Way:
    """One way to attend.

    ``quantization`` is the operator's name of the scales' granularity, ``padded`` is whether it
    adds a bias to the scores, which hides padding.
    """

    operator: str
    quantization: str = "NONE"
    shared: bool = True
    padded: bool = True

    @property
    def label(self) -> str:
        """What the table says."""
        cache = "float32" if self.quantization == "NONE" else f"int8 {self.quantization.lower()}"
        words = [self.operator, cache, "shared" if self.shared else "copied"]
        return ", ".join(words if self.padded else [*words, "no bias"])


WAYS = (
    Way("Attention", shared=False),
    Way("GroupQueryAttention", shared=False),
    Way("GroupQueryAttention"),
    Way("GroupQueryAttention", padded=False),
    Way("GroupQueryAttention", "PER_TENSOR"),
    Way("GroupQueryAttention", "PER_CHANNEL"),
)


def stack(shape: Shape, way: Way) -> ir.Model:
    """Return the graph of all layers; what a layer returns is the query of the next."""
    grouped, quantized = way.operator == "GroupQueryAttention", way.quantization != "NONE"
    floats, cache = ir.DataType.FLOAT, ir.DataType.INT8 if quantized else ir.DataType.FLOAT
    widths = (shape.heads, shape.kv_heads, shape.kv_heads)
    query, *new = (
        ir.val(name, floats, ["batch", "sequence", heads * shape.head_size])
        for name, heads in zip(("query", *SLOTS), widths, strict=True)
    )
    bias = ir.val("bias", floats, ["batch", 1, "sequence", "total"])
    lengths = [ir.val("last", ir.DataType.INT32, ["batch"]), ir.val("total", ir.DataType.INT32, [])]
    masks = [bias] if way.padded else []
    inputs, outputs, nodes = [query, *new, *masks, *(lengths if grouped else [])], [], []
    sizes = [1, shape.kv_heads, 1, shape.head_size] if way.quantization == "PER_CHANNEL" else [1]
    tensor = ir.tensor(np.full(sizes, 4 / 127, np.float32), name="scale")
    scale = ir.val("scale", floats, sizes, const_value=tensor)
    for layer in range(shape.layers):
        past = [ir.val(f"past.{layer}.{s}", cache, shape.cache("batch", "past")) for s in SLOTS]
        inputs += past
        if grouped:
            given: list[ir.Value | None] = [query, *new, *past, *lengths, None, None, None]
            given += masks or [None]
            given += [None, scale, scale] if quantized else []
            attributes: dict[str, int | str] = {
                "num_heads": shape.heads,
                "kv_num_heads": shape.kv_heads,
            }
            kinds = {"k_quant_type": way.quantization, "v_quant_type": way.quantization}
            attributes |= {**kinds, "kv_cache_bit_width": 8} if quantized else {}
        else:
            given = [query, *new, bias, *past]
            attributes = {"q_num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
        domain = "com.microsoft" if grouped else ""
        node = ir.node(way.operator, given, attributes, domain=domain, num_outputs=3)
        query, *present = node.outputs
        for value, slot in zip(present, SLOTS, strict=True):
            value.name = f"present.{layer}.{slot}"
            value.type, value.shape = past[0].type, ir.Shape(shape.cache("batch", "present"))
        nodes.append(node)
        outputs += present
    query.name, query.type, query.shape = "output", ir.TensorType(floats), new[0].shape
    opsets = {"": 23, "com.microsoft": 1}
    weights = [scale] if quantized else []
    graph = ir.Graph(
        inputs, [query, *outputs], nodes=nodes, initializers=weights, opset_imports=opsets
    )
    return ir.Model(graph, ir_version=10)


def step(shape: Shape, way: Way, *, past: int, sequence: int, threads: int) -> Callable[[], None]:
    """Return a function that runs one call with this past."""
    options = session_options(threads=threads, stop_spinning=True)
    content = ir.to_proto(stack(shape, way)).SerializeToString()
    session = create_session(content, options, ep="cpu", name=Path("attention"))
    random, binding = np.random.default_rng(0), session.io_binding()
    kinds = {"tensor(int8)": np.int8, "tensor(int32)": np.int32, "tensor(float)": np.float32}
    total = past + sequence
    room = total if way.shared else past
    sizes = {"batch": 1, "sequence": sequence, "past": room, "total": total}
    for value in session.get_inputs():
        given = random.normal(size=[sizes.get(size, size) for size in value.shape])
        if "int" in value.type:
            lengths = {"last": np.array([total - 1]), "total": np.array(total)}
            given = lengths.get(value.name, given * 32)
        tensor = OrtValue.ortvalue_from_numpy(given.astype(kinds[value.type]))
        binding.bind_ortvalue_input(value.name, tensor)
        if value.name.startswith("past"):
            present = value.name.replace("past", "present")
            if way.shared:
                binding.bind_ortvalue_output(present, tensor)
            else:
                binding.bind_output(present)
    binding.bind_output("output")
    return lambda: session.run_with_iobinding(binding)


@click.command()
@click.option("--layers", default=4, show_default=True)
@click.option("--heads", default=16, show_default=True)
@click.option("--kv-heads", default=16, show_default=True)
@click.option("--head-size", default=128, show_default=True)
@click.option("--past", "pasts", type=int, multiple=True, default=(128, 4096), show_default=True)
@click.option("--sequence", default=1, show_default=True, help="Tokens per call.")
@click.option("--threads", default=2, show_default=True)
@click.option("--runs", default=30, show_default=True)
def main(
    layers: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    pasts: tuple[int, ...],
    sequence: int,
    threads: int,
    runs: int,
) -> None:
    """Print milliseconds per call: medians, and the best run in brackets."""
    shape = Shape(layers, heads, kv_heads, head_size)
    steps = {
        (way, past): step(shape, way, past=past, sequence=sequence, threads=threads)
        for way in WAYS
        for past in pasts
    }
    times: dict[tuple[Way, int], list[float]] = {key: [] for key in steps}
    for _ in range(runs):
        for key, run in steps.items():
            run()  # its turn begins with what it needs in the processor's caches
            start = time.perf_counter()
            run()
            times[key].append(1e3 * (time.perf_counter() - start))
    print(f"| {layers} layers | {' | '.join(f'past {p}' for p in pasts)} | to the first |")
    print("|---|" + "---:|" * (len(pasts) + 1))
    first = WAYS[0], pasts[-1]
    for way in WAYS:
        cells = [
            f"{statistics.median(t):.2f} ({min(t):.2f})" for p in pasts if (t := times[way, p])
        ]
        pairs = zip(times[way, pasts[-1]], times[first], strict=True)
        ratio = statistics.median(mine / other for mine, other in pairs)
        print(f"| {way.label} | {' | '.join(cells)} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
