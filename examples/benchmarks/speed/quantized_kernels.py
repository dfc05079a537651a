"""The quantised kernels alone: how block sizes and divided experts pay, and how fast weights move.

Graphs of nothing but MatMulNBits, or nothing but QMoE, with random weights that exceed the
processor's caches, all run in turns. The first table shows the block sizes of linear layers, the
second how long experts take that are stored whole or as halves, by how many of them a token runs.

    python examples/benchmarks/speed/quantized_kernels.py
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import click
import numpy as np
import onnx_ir as ir
from bandwidth import Reader
from random_models.shapes import SHAPES, Shape

from alloc_moe.compiler.rounding.formats import BLOCK
from alloc_moe.passes.blockwise import block_that_fits
from alloc_moe.runtime.execution.providers import create_session, session_options

Key = TypeVar("Key", bound=Hashable)

BITS = 4
BLOCKS = (32, 64, 128, 256)
PARTS = {"whole": 1, "halves": 2}
_COPIES = 8  # of a layer: more bytes than caches hold
_CHOICES = 16  # of experts, in turns
_MICROSOFT = "com.microsoft"
_SEED = 0


def linear(shape: Shape, block: int) -> Callable[[int], Callable[[], object]]:
    """Return what makes a call of some tokens: queries, keys and values of `_COPIES` layers."""
    rows, columns = 3 * shape.hidden, shape.hidden
    tokens = ir.val("tokens", ir.DataType.FLOAT, ["t", columns])
    attributes = {"K": columns, "N": rows, "bits": BITS, "block_size": block, "accuracy_level": 4}
    weights: list[ir.Value] = []
    nodes: list[ir.Node] = []
    for copy in range(_COPIES):
        parts = _weights(f"{copy}", (rows, columns // block), block // 2)
        weights += parts
        nodes.append(ir.node("MatMulNBits", [tokens, *parts], attributes, domain=_MICROSOFT))
    run = _session(_model([tokens], nodes, weights))
    return lambda count: lambda: run({"tokens": _random(count, columns)})


def experts(shape: Shape, parts: int) -> Callable[[int, int], Callable[[], object]]:
    """Return what makes a call of some tokens that run so many of the trained experts each.

    Which ones, differs from token to token and from call to call.
    """
    number, width, hidden = shape.experts * parts, shape.expert_size // parts, shape.hidden
    tokens = ir.val("tokens", ir.DataType.FLOAT, ["t", hidden])
    chosen = ir.val("chosen", ir.DataType.FLOAT, ["t", number])
    block = block_that_fits(BLOCK, [hidden, shape.expert_size // max(PARTS.values())])
    assert block is not None
    attributes = {
        "k": shape.experts_per_token * parts,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": 0,
        "expert_weight_bits": BITS,
        "block_size": block,
        "accuracy_level": 4,
    }
    up = _weights("up", (number, 2 * width, hidden // block), block // 2, flat=True)
    down = _weights("down", (number, hidden, width // block), block // 2, flat=True)
    given = [tokens, chosen, *up, None, *down, *[None] * 7, chosen]
    node = ir.node("QMoE", given, attributes, domain=_MICROSOFT)
    run = _session(_model([tokens, chosen], [node], [*up, *down]))

    def call(count: int, active: int) -> Callable[[], object]:
        order, every = np.random.default_rng(_SEED), np.tile(np.arange(shape.experts), (count, 1))
        feeds = []
        for _ in range(_CHOICES):
            picked = order.permuted(every, axis=1)[:, :active]
            weights = np.zeros((count, shape.experts), np.float32)
            np.put_along_axis(weights, picked, np.float32(1 / active), axis=1)
            feeds.append({"tokens": _random(count, hidden), "chosen": np.tile(weights, parts)})
        turns = itertools.cycle(feeds)
        return lambda: run(next(turns))

    return call


def _weights(
    name: str, blocks: Sequence[int], size: int, *, flat: bool = False
) -> tuple[ir.Value, ir.Value]:
    """Return random packed values and their scales; with ``flat`` rows aren't cut into blocks."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    packed = random.integers(0, 256, (*blocks, size), np.uint8)
    if flat:
        packed = packed.reshape(*blocks[:-1], -1)
    scales = random.uniform(0.001, 0.01, blocks).astype(np.float32)
    tensors = ir.tensor(packed, name=f"{name}.values"), ir.tensor(scales, name=f"{name}.scales")
    values, steps = (
        ir.Value(
            name=t.name, shape=ir.Shape(t.shape.numpy()), type=ir.TensorType(t.dtype), const_value=t
        )
        for t in tensors
    )
    return values, steps


def _model(
    inputs: Sequence[ir.Value], nodes: Sequence[ir.Node], weights: Sequence[ir.Value]
) -> ir.Model:
    outputs = [node.outputs[0] for node in nodes]
    for index, value in enumerate(outputs):
        value.name, value.type = f"output.{index}", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 23, _MICROSOFT: 1}
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports=opsets)
    return ir.Model(graph, ir_version=10)


def _session(model: ir.Model) -> Callable[[Mapping[str, np.ndarray]], object]:
    options = session_options(threads=os.cpu_count(), stop_spinning=True)
    content = ir.to_proto(model).SerializeToString()
    session = create_session(content, options, ep="cpu", name=Path("kernels"))
    return lambda feeds: session.run(None, feeds)


def _random(*sizes: int) -> np.ndarray:
    return np.random.default_rng(_SEED).normal(size=sizes).astype(np.float32)


def in_turns(calls: Mapping[Key, Callable[[], object]], runs: int) -> dict[Key, float]:
    """Return the median seconds of each call, all of which take turns after one to warm up."""
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for turn in range(runs + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(found) for key, found in seconds.items()}


def blocks_table(shape: Shape, *, tokens: int, runs: int, bandwidth: float) -> list[str]:
    """Return a row per block size of how fast weights are read and multiplied."""
    made = {block: linear(shape, block) for block in BLOCKS if shape.hidden % block == 0}
    decode = in_turns({block: make(1) for block, make in made.items()}, 8 * runs)
    prefill = in_turns({block: make(tokens) for block, make in made.items()}, runs)
    count = 3 * shape.hidden**2 * _COPIES
    share = f"of {bandwidth / 1e9:.0f}"
    lines = [
        f"| block | one token: us | GB/s | {share} | {tokens} tokens: ms | TFLOP/s |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for block in made:
        speed = count * (BITS / 8 + 4 / block) / decode[block]
        lines.append(
            f"| {block} | {1e6 * decode[block] / _COPIES:.0f} | {speed / 1e9:.1f} "
            f"| {speed / bandwidth:.2f} | {1e3 * prefill[block] / _COPIES:.2f} "
            f"| {2e-12 * count * tokens / prefill[block]:.2f} |"
        )
    return lines


def experts_table(shape: Shape, *, tokens: int, runs: int) -> list[str]:
    """Return a row per number of experts that a token runs: one layer, whole and in halves."""
    made = {name: experts(shape, parts) for name, parts in PARTS.items()}
    numbers = range(1, shape.experts_per_token + 1)
    keys = [(name, active) for active in numbers for name in PARTS]
    decode = in_turns({(name, n): made[name](1, n) for name, n in keys}, 8 * runs)
    prefill = in_turns({(name, n): made[name](tokens, n) for name, n in keys}, runs)
    lines = [
        "| experts | one token, whole: us | halves | ratio "
        f"| {tokens} tokens, whole: ms | halves | ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for n in numbers:
        cells = []
        for found, unit in ((decode, 1e6), (prefill, 1e3)):
            whole, halves = found["whole", n], found["halves", n]
            cells += [f"{unit * whole:.1f}", f"{unit * halves:.1f}", f"{halves / whole:.2f}"]
        lines.append(f"| {n} | {' | '.join(cells)} |")
    return lines


@click.command()
@click.option("--shape", default="olmoe-1b-7b", show_default=True, type=click.Choice(list(SHAPES)))
@click.option("--tokens", default=512, show_default=True, help="Of a prompt.")
@click.option("--runs", default=9, show_default=True, help="Of a prompt; single tokens 8 times.")
def main(shape: str, tokens: int, runs: int) -> None:
    """Print medians per layer."""
    bandwidth = max(Reader(os.cpu_count() or 1).measure().values())
    print("Queries, keys and values by MatMulNBits:\n")
    options = {"tokens": tokens, "runs": runs}
    print("\n".join(blocks_table(SHAPES[shape], **options, bandwidth=bandwidth)))
    print("\nExperts by QMoE:\n")
    print("\n".join(experts_table(SHAPES[shape], **options)))


if __name__ == "__main__":
    main()
