"""Step programs as artifacts carry them: what of them can be run, and that their weights fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from alloc_moe.runtime.artifact.plan import NO_STEP_KEY, STEP_KEY
from alloc_moe.runtime.artifact.tensors import Initializer
from alloc_moe.runtime.cuda.routers import MOST_CANDIDATES, MOST_EXPERTS
from alloc_moe.runtime.errors import DeviceError

Program = Mapping[str, Any]

_FORMAT = 1
_POOLS = ("batch", "sequence")
_NAMES = frozenset(
    {
        *("weight", "bias", "selection_bias", "sizes", "cos", "sin", "scales"),
        *("gate", "up", "gate_up", "gate_up_bias", "down", "down_bias", "shared_gate"),
    }
)
_ELEMENT_TYPES = {"float16": 10, "bfloat16": 16, "float32": 1}
_LANE = 8  # elements that sizes are multiples of


def step_program(metadata: Mapping[str, str]) -> Mapping[str, Any] | str:
    """Return an artifact's step program, or why it can't be run."""
    text = metadata.get(STEP_KEY)
    if text is None:
        return metadata.get(NO_STEP_KEY, "the artifact was compiled without a step program")
    try:
        program: Program = json.loads(text)
        return _refusal(program) or program
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "its step program is damaged"


def _refusal(program: Program) -> str | None:
    """Return what the kernels don't handle of a program."""
    if program.get("format") != _FORMAT:
        return f"its step program is of format {program.get('format')}, which isn't known here"
    for op in program["ops"]:
        if op["op"] == "route" and (op["experts"] > MOST_EXPERTS or op["top_k"] > MOST_CANDIDATES):
            chosen = f"{op['top_k']} of {op['experts']} experts"
            return f"a router chooses {chosen}, more than is handled"
        if op["op"] == "experts" and op.get("activation", "silu") != "silu":
            return f"its experts' activation is {op['activation']}"
        if any((op.get(norm) or {}).get("offset") for norm in ("q_norm", "k_norm")):
            return "its norms of queries have an offset"
    return "its weights have zero points" if '"zero_points"' in json.dumps(program) else None


def weight_names(value: Any, key: str = "") -> Iterator[str]:
    """Yield the initializers that a step program names."""
    if isinstance(value, Mapping):
        if value.get("op") == "scale_rows":  # whose gate is a buffer
            return
        for name, inner in value.items():
            yield from weight_names(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from weight_names(inner, key)
    elif isinstance(value, str) and key in _NAMES:
        yield value


def quantized_names(program: Program) -> Iterator[str]:
    """Yield the initializers that are integers in blocks, and their scales."""
    for name, _, block in weight_sizes(program):
        if block:
            yield from (name, block["scales"])


def prefill_obstacle(program: Program, *, redistribution: str) -> str | None:
    """Return why a program's calls of many tokens can't be computed so, None if they can."""
    if program["dtype"] == "float32":
        return "float32"
    if redistribution in _POOLS:
        return f"redistribution {redistribution}"
    for op in program["ops"]:
        shared = op.get("shared") or {}
        formats = [op.get("format"), shared.get("format")]
        if any(formats) and any(
            format_ for given in formats if given for format_ in given.values()
        ):
            return "quantised weights"
        if op["op"] == "route" and (op["keep"].get("quota") is not None or op.get("bias")):
            return "a cap or a biased router"
        if op["op"] == "attention" and op["size"] % 16:
            return "a head size that is no multiple of 16"
    return None


def check_program(program: Program, initializers: Mapping[str, Initializer]) -> None:
    """Raise DeviceError unless the weights have the sizes that kernels will read.

    Kernels check nothing: what a damaged or hostile program says would be read beyond its end.
    """
    checks = weight_sizes(program)
    element_type = _ELEMENT_TYPES.get(str(program.get("dtype")))
    for name, size, block in checks:
        given = initializers[name]
        stored = size * block["bits"] // 8 if block else size
        fits = given.values.size >= stored and (block or given.element_type == element_type)
        if block:
            scales = initializers[block["scales"]]
            fits = fits and scales.values.size >= size // block["block"]
            fits = fits and scales.element_type == element_type
        if not fits:
            raise DeviceError(f"the weight {name} doesn't fit the step program")


def _check_buffers(program: Program) -> None:
    """Raise ValueError if an operation reads beyond a buffer, or a layer that isn't there."""
    widths: dict[str, int] = {}
    cache = {entry["layer"]: (entry["heads"], entry["key_size"]) for entry in program["kv"]}
    hidden = program["hidden"]

    def reads(name: str | None, size: int, offset: int | None = 0) -> None:
        if name is not None and not 0 <= (offset or 0) <= widths[name] - size:
            raise ValueError(f"{size} elements are read of {name}")

    for op in program["ops"]:
        kind, width = op["op"], op.get("n", hidden)
        if kind == "linear":
            reads(op["x"], op["k"], op.get("x_offset"))
            reads(op.get("residual"), width)
        elif kind == "attention":
            heads, size = (op["heads"], op["kv_heads"], op["kv_heads"]), op["size"]
            for part, count in zip("qkv", heads, strict=True):
                reads(op[part]["buffer"], _size(count, 1) * size, op[part].get("offset"))
            if cache[op["layer"]] != (op["kv_heads"], size) or heads[0] % heads[1]:
                raise ValueError(f"the heads of layer {op['layer']} don't fit the cache")
            width = heads[0] * size
        elif kind == "swiglu":
            reads(op["x"], width if op.get("y") else 2 * width, op.get("x_offset"))
            reads(op.get("y"), width)
        elif kind in ("norm", "add", "scale_rows", "experts"):
            reads(op["x"], width, op.get("x_offset"))
            reads(op.get("y"), width)
            reads(op.get("residual"), width)
        elif kind == "route":
            width = widths[op["x"]]
            if op.get("normed"):
                widths[op["normed"]] = width
        widths[op["out"]] = width


def weight_sizes(program: Program) -> list[tuple[str, int, Mapping[str, Any] | None]]:
    """Return weights, how many elements of each are read, and how they are quantised.

    Raises:
        DeviceError: Something is missing, or would be read beyond its end.
    """
    try:
        _check_buffers(program)
        return list(_sizes(program))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeviceError(f"the step program is damaged: {error!r}") from error


def _sizes(program: Program) -> Iterator[tuple[str, int, Mapping[str, Any] | None]]:
    """Yield weights, how many elements of each are read, and how they are quantised."""
    hidden, positions = _size(program["hidden"], 16), program["context_length"]
    widths: dict[str, int] = {}
    for op in program["ops"]:
        kind, formats = op["op"], op.get("format") or {}
        if kind == "embed":
            yield op["weight"], _size(program["vocabulary"], 1) * hidden, formats or None
        elif kind == "linear":
            n, k = _size(op["n"], 1), _size(op["k"], _LANE)
            yield op["weight"], n * k, formats or None
            yield from _vectors(op, ("bias",), n)
            yield from _vectors(op.get("norm") or {}, ("weight",), k)
        elif kind == "norm":
            yield op["weight"], _size(op.get("size") or op["n"], _LANE), None
        elif kind == "attention":
            size = _size(op["size"], _LANE)
            for norm, heads in (("q_norm", op["heads"]), ("k_norm", op["kv_heads"])):
                given = op.get(norm) or {}
                yield from _vectors(given, ("weight",), size * (heads if given.get("whole") else 1))
            if rotary := op.get("rotary"):
                table = _size(positions, 1) * _size(rotary["size"], 2) // 2
                yield from _vectors(rotary, ("cos", "sin"), table)
        elif kind == "route":
            k, experts = _size(widths.get(op["x"], hidden), _LANE), _size(op["experts"], 1)
            yield op["weight"], experts * k, None
            yield from _vectors(op, ("bias",), experts)
            yield from _vectors(op.get("norm") or {}, ("weight",), k)
        elif kind == "experts":
            yield from _expert_sizes(program, op, hidden)
        widths[op["out"]] = op.get("n", hidden)


def _expert_sizes(
    program: Program, op: Mapping[str, Any], hidden: int
) -> Iterator[tuple[str, int, Mapping[str, Any] | None]]:
    inner, formats = _size(op["intermediate"], _LANE), op.get("format") or {}
    (route,) = (r for r in program["ops"] if r["op"] == "route" and r["out"] == op["routing"])
    experts = _size(route["experts"], 1)
    yield op["gate_up"], experts * 2 * inner * hidden, formats.get("gate_up")
    yield op["down"], experts * hidden * inner, formats.get("down")
    yield from _vectors(op, ("gate_up_bias",), experts * 2 * inner)
    yield from _vectors(op, ("down_bias",), experts * hidden)
    if shared := op.get("shared"):
        size, given = _size(shared["intermediate"], _LANE) * hidden, shared["gate_up"]
        forms = shared.get("format") or {}
        form = forms.get("gate_up")
        if isinstance(given, str):
            yield given, 2 * size, form
        else:
            for name in ("gate", "up"):
                yield given[name], size, form if form is None or "bits" in form else form[name]
        yield shared["down"], size, forms.get("down")
        yield from _vectors(shared, ("gate",), hidden)


def _vectors(
    given: Mapping[str, Any], names: tuple[str, ...], size: int
) -> Iterator[tuple[str, int, None]]:
    for name in names:
        if given.get(name):
            yield given[name], size, None


def _size(value: Any, multiple: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise ValueError(f"a size is {value!r}")
    if value % multiple:
        raise ValueError(f"the size {value} is no multiple of {multiple}")
    return value
