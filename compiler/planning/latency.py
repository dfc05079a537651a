"""Shapes of MoE layers -> milliseconds that their operator takes on this machine, for each k."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from alloc_moe.compiler.errors import CostError
from alloc_moe.compiler.planning.saved import FORMAT, read_latencies
from alloc_moe.compiler.planning.shapes import ExpertShape
from alloc_moe.compiler.workspace.files import explained, save_text, temporary_folder
from alloc_moe.passes.base import DOMAIN, ROUTED_EXPERTS
from alloc_moe.passes.default import specialize_passes
from alloc_moe.passes.experts.lower import Allocation
from alloc_moe.runtime.artifact.plan import DROPPED, ROUTER_PROBS

if TYPE_CHECKING:
    from alloc_moe.runtime.console import Console

_ROUNDS = 15
_SECONDS_PER_VISIT = 0.02
_CALLS_PER_VISIT = 3  # at least
_ROUTINGS = 32  # different choices of experts, so that the weights don't just stay in a cache
_NOISY = 0.25  # quartiles further apart than this share of the median are told
_ALIGNMENT = 4096  # of tensors in the file, so that it can be mapped


@dataclass(frozen=True)
class LayerLatency:
    """Milliseconds of one shape's MoE operator with k = 1..K experts per token.

    Medians over rounds, as they were measured: where k + 1 took less than k it is noise, or a step
    of the kernel, and nothing is smoothed. The allocation may then take k + 1, the cheaper one.
    Each round counts the fastest of several calls with different routings.
    ``spread[k - 1]`` is the distance of the quartiles as a share of the median.
    """

    milliseconds: tuple[float, ...]
    spread: tuple[float, ...]


def latency_path(profile: Path) -> Path:
    """Return where latencies are kept: beside the sensitivity profile."""
    stem = profile.name.removesuffix(".json").removesuffix(".profile")
    return profile.with_name(f"{stem}.latency.json")


def measure_latencies(
    shapes: Sequence[ExpertShape],
    *,
    dtype: str,
    batch: int,
    path: Path | None = None,
    console: Console | None = None,
) -> dict[ExpertShape, tuple[float, ...]]:
    """Return milliseconds for k = 1..K of each distinct shape.

    Measured is the operator as the CPU artifact runs it: at the trained K, with the router
    probabilities of dropped experts masked. One layer's random weights are in memory at a time.

    Args:
        shapes: Of the model's layers; each distinct one is measured once.
        dtype: Type of the weights.
        batch: Tokens in a call, each with k experts of its own, drawn uniformly.
        path: Measurements are kept here. One of the same machine, onnxruntime, shape, type and
            batch is used again; others in the file stay.
        console: Where progress is told.

    Raises:
        CostError: onnxruntime's CPU kernel doesn't compute in this type.
        OutputError: The file can't be written.
    """
    if dtype != "float32":
        raise CostError(
            f"Latency is measured on the CPU, where onnxruntime's MoE operator has no {dtype}. "
            "Use --cost bytes, or --dtype float32."
        )
    kept = read_latencies(path)
    found: dict[ExpertShape, LayerLatency] = {}
    for shape in dict.fromkeys(shapes):
        key = _key(shape, dtype=dtype, batch=batch)
        known = [entry for entry in kept if all(entry.get(k) == v for k, v in key.items())]
        if known:
            found[shape] = _latency(known[0])
            continue
        folder = None if path is None else path.absolute().parent
        found[shape] = measure_layer(shape, batch=batch, folder=folder, console=console)
        if path is not None:
            # Another compile may have added some meanwhile.
            kept = [*read_latencies(path), {**key, **dataclasses.asdict(found[shape])}]
            text = json.dumps({"format": FORMAT, "measurements": kept}, indent=1)
            save_text(text + "\n", path, what="The latencies")
    if console is not None:
        _report(found, console)
    return {shape: latency.milliseconds for shape, latency in found.items()}


def measure_layer(
    shape: ExpertShape,
    *,
    batch: int,
    rounds: int = _ROUNDS,
    folder: Path | None = None,
    console: Console | None = None,
) -> LayerLatency:
    """Measure one layer: every round visits each k once, in random order.

    Args:
        shape: Of the layer.
        batch: Tokens in a call.
        rounds: How often each k is visited.
        folder: Where the weights are written for the time being; by default where temporary files
            go.
        console: Where progress is told.
    """
    random = np.random.default_rng(0)
    with temporary_folder(folder, ".latency-") as temporary:
        then = "choose a --profile on another disk, beside which they are measured"
        with explained("A layer to measure", temporary, then=then):
            graph = write_layer(shape, temporary, random)
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        feeds = [_feeds(shape, batch, random) for _ in range(_ROUTINGS)]
        if console is None:
            seconds = _time(session, feeds, rounds, random, advance=lambda: None)
        else:
            what = f"Timing {shape.experts} experts of {shape.hidden}x{shape.intermediate}"
            visits = rounds * shape.experts_per_token
            with console.progress(what, visits, unit="visits") as progress:
                seconds = _time(session, feeds, rounds, random, advance=progress.advance)
        del session  # it maps the file
    return _summary(seconds)


def write_layer(shape: ExpertShape, folder: Path, random: np.random.Generator) -> str:
    """Write a graph of one layer's lowered MoE operator with random weights; return its path.

    Inputs are ``hidden`` [T, H] and ``router_probs`` [T, E], as the lowering makes them.
    """
    model = _routed_experts(shape, folder, random)
    specialize_passes(Allocation([shape.experts_per_token], "none"), pairs=False)(model)
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    made = values[ROUTER_PROBS.format(layer=0)]
    given = ir.val("router_probs", ir.DataType.FLOAT, ["tokens", shape.experts])
    ir.convenience.replace_all_uses_with(made, given)
    (operator,) = (node for node in graph if node.op_type == "MoE")
    output = operator.outputs[0]
    output.type, output.shape = graph.inputs[1].type, graph.inputs[1].shape
    hidden = graph.inputs[1]
    graph.inputs.clear()
    graph.inputs.extend([hidden, given])
    graph.outputs.clear()
    graph.outputs.append(output)
    for node in list(graph):
        if node is not operator:
            graph.remove(node)
    path = folder / "layer.onnx"
    ir.save(model, path)
    return str(path)


def _routed_experts(shape: ExpertShape, folder: Path, random: np.random.Generator) -> ir.Model:
    """Return a graph of one RoutedExperts node, its weights in a file of `folder`."""
    candidates = shape.experts_per_token
    inputs = [
        ir.val("input_ids", ir.DataType.INT64, ["tokens", 1]),
        ir.val("hidden", ir.DataType.FLOAT, ["tokens", shape.hidden]),
        ir.val("expert_ids", ir.DataType.INT64, ["tokens", candidates]),
        ir.val("expert_weights", ir.DataType.FLOAT, ["tokens", candidates]),
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 23, DOMAIN: 1}, name="layer")
    weights: dict[str, tuple[int, ...]] = {"gate_up": (2 * shape.intermediate, shape.hidden)}
    if shape.biased:
        weights["gate_up_bias"] = (2 * shape.intermediate,)
    weights["down"] = (shape.hidden, shape.intermediate)
    if shape.biased:
        weights["down_bias"] = (shape.hidden,)
    values: dict[str, ir.Value] = {}
    with (folder / "weights").open("wb") as file:
        for name, of_expert in weights.items():
            tensor = _write_weight(name, of_expert, shape.experts, file, random)
            values[name] = ir.Value(
                name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            graph.initializers[name] = values[name]
    node = ir.node(
        ROUTED_EXPERTS,
        [*inputs[1:], *(values.get(n) for n in ("gate_up", "gate_up_bias", "down", "down_bias"))],
        attributes={"layer": 0, "transposed": 0, "interleaved": 1},
        domain=DOMAIN,
        name="experts",
    )
    user = ir.node("Identity", node.outputs)  # a graph's own output couldn't be replaced
    graph.extend([node, user])
    graph.outputs.append(user.outputs[0])
    return ir.Model(graph, ir_version=10)


def _write_weight(
    name: str,
    of_expert: tuple[int, ...],
    experts: int,
    file: BinaryIO,
    random: np.random.Generator,
) -> ir.ExternalTensor:
    """Write the same random weights for every expert: time depends on where they are read from."""
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    start = file.tell()
    content = random.standard_normal(of_expert, dtype=np.float32) / math.sqrt(of_expert[-1])
    for _ in range(experts):
        file.write(content.data)
    return ir.ExternalTensor(
        Path(file.name).name,
        start,
        experts * content.nbytes,
        ir.DataType.FLOAT,
        shape=ir.Shape((experts, *of_expert)),
        name=name,
        base_dir=Path(file.name).parent,
    )


def _feeds(
    shape: ExpertShape, batch: int, random: np.random.Generator
) -> list[dict[str, NDArray[np.float32]]]:
    """Return inputs for k = 1..K: the first k of the same K experts per token."""
    tokens = np.arange(batch)[:, None]
    order = random.permuted(np.tile(np.arange(shape.experts), (batch, 1)), axis=1)
    hidden = random.standard_normal((batch, shape.hidden), dtype=np.float32)
    scores = np.log(random.uniform(0.5, 1.0, (batch, shape.experts))).astype(np.float32)
    feeds = []
    for k in range(1, shape.experts_per_token + 1):
        probabilities = np.full_like(scores, DROPPED)
        probabilities[tokens, order[:, :k]] = scores[:, :k]
        feeds.append({"hidden": hidden, "router_probs": probabilities})
    return feeds


def _time(
    session: onnxruntime.InferenceSession,
    feeds: Sequence[Sequence[Mapping[str, Any]]],
    rounds: int,
    random: np.random.Generator,
    *,
    advance: Callable[[], None],
) -> list[list[float]]:
    """Return seconds per call of each k in each round; ``feeds[routing][k - 1]``."""
    for of_routing in feeds:  # first calls are slow
        session.run(None, dict(of_routing[-1]))
    most = _fastest(session, [of_routing[-1] for of_routing in feeds])
    calls = min(len(feeds), max(_CALLS_PER_VISIT, math.ceil(_SECONDS_PER_VISIT / most)))
    seconds: list[list[float]] = [[] for _ in feeds[0]]
    for _ in range(rounds):
        first = int(random.integers(len(feeds)))
        for index in random.permutation(len(seconds)):
            # The same routings for every k of the round.
            of_k = [feeds[(first + call) % len(feeds)][index] for call in range(calls)]
            seconds[index].append(_fastest(session, of_k))
            advance()
    return seconds


def _fastest(session: onnxruntime.InferenceSession, feeds: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds of the fastest call: what else runs on the machine only ever adds."""
    seconds = []
    for feed in feeds:
        start = time.perf_counter()
        session.run(None, dict(feed))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _summary(seconds: Sequence[Sequence[float]]) -> LayerLatency:
    low, median, high = np.percentile(np.array(seconds), [25, 50, 75], axis=1)
    spread = (high - low) / median
    return LayerLatency(
        tuple(float(ms) for ms in median * 1000), tuple(float(share) for share in spread)
    )


def _report(found: Mapping[ExpertShape, LayerLatency], console: Console) -> None:
    for shape, latency in found.items():
        times = " ".join(f"{ms:.3g}" for ms in latency.milliseconds)
        console.note(f"{shape.experts} experts of {shape.hidden}x{shape.intermediate}: {times} ms")
        worst = max(latency.spread)
        if worst > _NOISY:
            console.warn(
                f"These times vary by {worst:.0%} between rounds: other work keeps this machine "
                "busy. Delete the latency file and measure again when it is idle."
            )


def _key(shape: ExpertShape, *, dtype: str, batch: int) -> dict[str, Any]:
    """Return what a measurement depends on."""
    return {
        "machine": _machine(),
        "onnxruntime": onnxruntime.__version__,
        "shape": dataclasses.asdict(shape),
        "dtype": dtype,
        "batch": batch,
    }


def _machine() -> str:
    """Return the processor and how many of its cores may be used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = Path("/proc/cpuinfo")
    lines = names.read_text(errors="replace").splitlines() if names.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {cores} cores"


def _latency(entry: Mapping[str, Any]) -> LayerLatency:
    return LayerLatency(
        tuple(float(ms) for ms in entry["milliseconds"]),
        tuple(float(share) for share in entry["spread"]),
    )
