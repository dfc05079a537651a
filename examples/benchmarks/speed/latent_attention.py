"""Latent attention alone: onnxruntime's operator against products with the cache of latents.

Each way is a graph of nothing but attention layers, each fed with the one before, that appends one
token in place. Projections into and out of the latent space are left out. All are run in turns.

    python examples/benchmarks/speed/latent_attention.py --past 128 --past 4096
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention
import click
import numpy as np
import onnx_ir as ir
from onnxruntime import OrtValue

from alloc_moe.runtime.execution.providers import create_session, session_options

HEADS, RANK, TURNED, OWN = 16, 512, 64, 128
WIDTH = RANK + TURNED


def products(layers: int, *, columns_too: bool) -> ir.Model:
    """Return the graph that multiplies by caches [1, columns, 576].

    With `columns_too` latents are kept a second time, column by column [1, 512, columns], so that
    both products read a cache in the order in which it lies.
    """
    floats, nodes, outputs = ir.DataType.FLOAT, [], []

    def add(op_type: str, inputs: list[ir.Value], domain: str = "", **attributes: Any) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes, domain=domain))
        return nodes[-1].outputs[0]

    def given(name: str, shape: list[int | str], dtype: ir.DataType = floats) -> ir.Value:
        inputs.append(ir.val(name, dtype, shape))
        return inputs[-1]

    inputs: list[ir.Value] = []
    query, bias = given("query", [1, HEADS, WIDTH]), given("bias", [1, 1, "columns"])
    new, place = given("new", [1, 1, WIDTH]), given("place", [1, 1, 2], ir.DataType.INT64)
    if columns_too:
        new_column = given("new_column", [1, RANK])
        spots = given("spots", [1, RANK, 3], ir.DataType.INT64)
    for layer in range(layers):
        rows = given(f"past.{layer}.rows", [1, "columns", WIDTH])
        cache = add("ScatterND", [rows, place, new])
        outputs.append((cache, rows))
        scores = add("FusedMatMul", [cache, query], "com.microsoft", transB=1, alpha=0.1)
        scores = add("Transpose", [scores], perm=(0, 2, 1))
        weights = add("Softmax", [add("Add", [scores, bias])], axis=-1)
        if columns_too:
            columns = given(f"past.{layer}.columns", [1, RANK, "columns"])
            by_column = add("ScatterND", [columns, spots, new_column])
            outputs.append((by_column, columns))
            sums = add("FusedMatMul", [by_column, weights], "com.microsoft", transB=1)
            latents = add("Transpose", [sums], perm=(0, 2, 1))
            query = add("Add", [query, add("ReduceMean", [latents], keepdims=1)])
        else:
            query = add("MatMul", [weights, cache])
    for value, past in outputs:
        value.name = (past.name or "").replace("past", "present")
        value.type, value.shape = past.type, past.shape
    query.name, query.type, query.shape = "output", ir.TensorType(floats), inputs[0].shape
    results = [query, *(value for value, _ in outputs)]
    opsets = {"": 23, "com.microsoft": 1}
    return ir.Model(ir.Graph(inputs, results, nodes=nodes, opset_imports=opsets), ir_version=10)


def products_step(layers: int, *, past: int, threads: int, columns_too: bool) -> Callable[[], None]:
    """Return a function that appends and attends to one token after so many."""
    options = session_options(threads=threads, stop_spinning=True)
    content = ir.to_proto(products(layers, columns_too=columns_too)).SerializeToString()
    session = create_session(content, options, ep="cpu", name=Path("products"))
    random, binding = np.random.default_rng(0), session.io_binding()
    spots = np.stack([np.zeros(RANK), np.arange(RANK), np.full(RANK, past)], axis=-1)
    places = {"place": np.array([[[0, past]]]), "spots": spots[None].astype(np.int64)}
    for value in session.get_inputs():
        shape = [past + 1 if size == "columns" else size for size in value.shape]
        floats = random.normal(scale=0.1, size=shape).astype(np.float32)
        tensor = OrtValue.ortvalue_from_numpy(places.get(value.name, floats))
        binding.bind_ortvalue_input(value.name, tensor)
        if value.name.startswith("past"):
            binding.bind_ortvalue_output(value.name.replace("past", "present"), tensor)
    binding.bind_output("output")
    return lambda: session.run_with_iobinding(binding)


def ways(layers: int, *, past: int, threads: int) -> dict[str, Callable[[], None]]:
    """Return each way's step, by what the table calls it."""
    call = {"past": past, "sequence": 1, "threads": threads}
    padded = attention.Shape(layers, HEADS, HEADS, OWN + TURNED)
    latent = attention.Shape(layers, HEADS, 1, WIDTH)
    grouped = attention.Way("GroupQueryAttention")
    return {
        "GroupQueryAttention, 16 heads of 192": attention.step(padded, grouped, **call),
        "GroupQueryAttention, one head of 576": attention.step(latent, grouped, **call),
        "products with the cache": products_step(
            layers, past=past, threads=threads, columns_too=False
        ),
        "products with two caches, the second transposed": products_step(
            layers, past=past, threads=threads, columns_too=True
        ),
    }


@click.command()
@click.option("--layers", default=2, show_default=True)
@click.option("--past", "pasts", type=int, multiple=True, default=(128, 4096), show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--runs", default=30, show_default=True)
def main(layers: int, pasts: tuple[int, ...], threads: int, runs: int) -> None:
    """Print milliseconds per layer: medians, and the best run in brackets."""
    steps = {past: ways(layers, past=past, threads=threads) for past in pasts}
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(runs):
        for past, found in steps.items():
            for name, run in found.items():
                run()  # its turn begins with what it needs in the processor's caches
                start = time.perf_counter()
                run()
                spent = 1e3 * (time.perf_counter() - start) / layers
                times.setdefault((name, past), []).append(spent)
    print(f"| a layer, ms | {' | '.join(f'past {past}' for past in pasts)} |")
    print("|---|" + "---:|" * len(pasts))
    for name in steps[pasts[0]]:
        cells = [
            f"{statistics.median(t):.2f} ({min(t):.2f})" for p in pasts if (t := times[name, p])
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
