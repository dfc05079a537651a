"""What a step program reads of weights and of its own buffers, counted before a kernel does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from alloc_moe.runtime.artifact.shapes import ShapeError

Operation = Mapping[str, Any]

_LOAD_BYTES = 16  # of one weight's row that a lane has at once: they have one scale


@dataclass(frozen=True)
class Read:
    """Elements that are read of an initializer, in the program's data type.

    ``block`` says how it is quantised, if it is. ``constant`` is whether it is converted to float32
    before it is read, whatever its type.
    """

    name: str
    size: int
    block: Mapping[str, Any] | None = None
    constant: bool = False


def weight_reads(program: Mapping[str, Any]) -> Iterator[Read]:
    """Yield what is read of weights, the shapes of whose names and numbers were checked.

    Raises:
        ShapeError: An operation reads what isn't there, or what kernels can't read.
    """
    walk = _Walk(program)
    for index, op in enumerate(program["ops"]):
        walk.where = f"ops[{index}]"
        reads: Iterator[Read] = getattr(walk, f"read_{op['op']}")(op)
        yield from reads
    if walk.widths.get("logits") != program["vocabulary"]:
        raise ShapeError(f"no operation computes logits of {program['vocabulary']} tokens")


class _Walk:
    """The buffers that the operations so far have written, and how wide they are."""

    def __init__(self, program: Mapping[str, Any]) -> None:
        self.where = ""
        self.widths: dict[str, int] = {}
        self._program, self._hidden = program, program["hidden"]
        self._cache = {
            entry["layer"]: (entry["heads"], entry["key_size"], entry["value_size"])
            for entry in program["kv"]
        }
        self._routes: dict[str, Operation] = {}
        self._last_route = ""

    def read_embed(self, op: Operation) -> Iterator[Read]:
        self._same("n", op["n"], self._hidden)
        yield self._table(op["weight"], self._program["vocabulary"], op["n"], op.get("format"))
        self._write(op["out"], op["n"])

    def read_linear(self, op: Operation) -> Iterator[Read]:
        n, k = op["n"], op["k"]
        self._read(op["x"], k, op.get("x_offset"))
        self._read(op.get("residual"), n)
        yield self._matrix(op["weight"], n, k, op.get("format"))
        yield from _vectors(op, ("bias",), n)
        yield from _vectors(op.get("norm"), ("weight",), k)
        self._write(op["out"], n)

    def read_norm(self, op: Operation) -> Iterator[Read]:
        size = op.get("size") or op["n"]
        self._divides("size", size, op["n"])
        self._read(op["x"], op["n"], op.get("x_offset"))
        yield Read(op["weight"], size)
        self._write(op["out"], op["n"])

    def read_attention(self, op: Operation) -> Iterator[Read]:
        heads, kv_heads, size = op["heads"], op["kv_heads"], op["size"]
        self._divides("kv_heads", kv_heads, heads)
        for part, count in zip("qkv", (heads, kv_heads, kv_heads), strict=True):
            self._read(op[part]["buffer"], count * size, op[part].get("offset"))
        if shared := op.get("k_shared"):
            self._read(shared["buffer"], shared["size"], shared.get("offset"))
            if shared["size"] > size or op.get("k_norm"):
                raise self._wrong(f"adds {shared['size']} elements to keys of {size}")
        if self._cache.get(op["layer"]) != (kv_heads, size, size):
            raise self._wrong(f"has heads that don't fit the cache of layer {op['layer']}")
        for norm, count in (("q_norm", heads), ("k_norm", kv_heads)):
            given = op.get(norm) or {}
            yield from _vectors(given, ("weight",), size * (count if given.get("whole") else 1))
        if rotary := op.get("rotary"):
            positions = self._program.get("context_length")
            if rotary["size"] > size or positions is None:
                raise self._wrong(f"rotates {rotary['size']} of {size} at {positions} positions")
            yield from _vectors(rotary, ("cos", "sin"), positions * rotary["size"] // 2)
        self._write(op["out"], heads * size)

    def read_route(self, op: Operation) -> Iterator[Read]:
        experts, candidates, keep = op["experts"], op["top_k"], op["keep"]
        self._whole(op["x"], self._hidden)
        self._same("hidden", op["hidden"], self._hidden)
        groups = op.get("groups") or {"count": 1, "keep": 1}
        self._divides("groups.count", groups["count"], experts)
        kept = candidates if keep["kind"] == "score" else keep.get("k")
        if kept is None or not kept <= candidates <= experts or groups["keep"] > groups["count"]:
            raise self._wrong(f"keeps {kept} of {candidates} of {experts} experts")
        scored = keep["kind"] == "score"
        if scored and (keep.get("score") is None or keep.get("threshold") is None):
            raise self._wrong("keeps experts by no score or threshold")
        if scored and keep["score"] in ("price", "overlap") and not keep.get("sizes"):
            raise self._wrong("has a price, and no sizes of experts")
        yield Read(op["weight"], experts * self._hidden)
        yield from _vectors(op, ("bias",), experts)
        yield from _vectors(op.get("norm"), ("weight",), self._hidden)
        for name in (op.get("selection_bias"), keep.get("sizes")):
            if name:
                yield Read(name, experts, constant=True)
        if token_sizes := keep.get("token_sizes"):
            if not keep.get("sizes"):
                raise self._wrong("multiplies sizes of experts, and has none")
            yield Read(token_sizes["matrix"], self._hidden * experts, constant=True)
            yield Read(token_sizes["bias"], experts, constant=True)
        if op.get("normed"):
            if not op.get("norm"):
                raise self._wrong("passes on normed values, and norms none")
            self._write(op["normed"], self._hidden)
        self._once(op["out"])
        self._routes[op["out"]] = op
        self._last_route = op["out"]

    def read_experts(self, op: Operation) -> Iterator[Read]:
        hidden, inner, formats = self._hidden, op["intermediate"], op.get("format") or {}
        self._same("n", op["n"], hidden)
        self._whole(op["x"], hidden)
        self._read(op.get("residual"), hidden)
        if op["routing"] != self._last_route:  # all layers have one memory for it
            raise self._wrong(f"runs experts that {op['routing']} doesn't choose just before")
        experts = self._routes[self._last_route]["experts"]
        yield self._matrix(op["gate_up"], experts * 2 * inner, hidden, formats.get("gate_up"))
        yield self._matrix(op["down"], experts * hidden, inner, formats.get("down"))
        yield from _vectors(op, ("gate_up_bias",), experts * 2 * inner)
        yield from _vectors(op, ("down_bias",), experts * hidden)
        if shared := op.get("shared"):
            yield from self._shared(shared)
        self._write(op["out"], hidden)

    def _shared(self, shared: Mapping[str, Any]) -> Iterator[Read]:
        inner, given, hidden = shared["intermediate"], shared["gate_up"], self._hidden
        forms = shared.get("format") or {}
        form = forms.get("gate_up")
        if isinstance(given, str):
            if form is not None and "bits" not in form:
                raise self._wrong("has one weight in two formats")
            yield self._matrix(given, 2 * inner, hidden, form)
        else:
            if form is not None and "bits" in form:
                raise self._wrong("has two weights in one format")
            parts = form or {}
            kinds = [_kind(parts.get(name)) for name in ("gate", "up")]
            if kinds[0] != kinds[1]:
                raise self._wrong("has a gate that is quantised otherwise than its factor")
            for name in ("gate", "up"):
                yield self._matrix(given[name], inner, hidden, parts.get(name))
        yield self._matrix(shared["down"], hidden, inner, forms.get("down"))
        yield from _vectors(shared, ("gate",), hidden)

    def read_swiglu(self, op: Operation) -> Iterator[Read]:
        n, y = op["n"], op.get("y")
        self._read(op["x"], n if y else 2 * n, op.get("x_offset"))
        if y:  # rows of the two are equally far apart
            self._whole(op["x"], n)
            self._whole(y, n)
        self._write(op["out"], n)
        yield from ()

    def read_add(self, op: Operation) -> Iterator[Read]:
        self._whole(op["x"], op["n"])
        self._whole(op["y"], op["n"])
        self._write(op["out"], op["n"])
        yield from ()

    def read_scale_rows(self, op: Operation) -> Iterator[Read]:
        self._whole(op["x"], op["n"])
        self._whole(op["gate"], 1)
        self._write(op["out"], op["n"])
        yield from ()

    def _table(self, name: str, n: int, k: int, block: Mapping[str, Any] | None) -> Read:
        if block is not None:
            self._divides("the block", block["block"], k)
        return Read(name, n * k, block)

    def _matrix(self, name: str, n: int, k: int, block: Mapping[str, Any] | None) -> Read:
        """Return what a product reads: of quantised rows, so many at once as have one scale."""
        if block is not None:
            self._divides("what is read at once", _LOAD_BYTES * 8 // block["bits"], block["block"])
        return self._table(name, n, k, block)

    def _read(self, name: str | None, size: int, offset: int | None = 0) -> None:
        if name is not None and (offset or 0) + size > self.widths.get(name, 0):
            raise self._wrong(f"reads {size} elements of {name}, which has not as many")

    def _whole(self, name: str, width: int) -> None:
        self._same(name, self.widths.get(name, 0), width)

    def _write(self, name: str, width: int) -> None:
        self._once(name)
        self.widths[name] = width

    def _once(self, name: str) -> None:
        if name in self.widths or name in self._routes:
            raise self._wrong(f"writes {name} again")

    def _same(self, name: str, value: int, expected: int) -> None:
        if value != expected:
            raise self._wrong(f"has {value} as {name}, where {expected} is expected")

    def _divides(self, name: str, part: int, whole: int) -> None:
        if whole % part:
            raise self._wrong(f"has {part} as {name}, which doesn't divide {whole}")

    def _wrong(self, problem: str) -> ShapeError:
        return ShapeError(f"{self.where} {problem}")


def _vectors(given: Mapping[str, Any] | None, names: tuple[str, ...], size: int) -> Iterator[Read]:
    for name in names:
        if given and given.get(name):
            yield Read(given[name], size)


def _kind(block: Mapping[str, Any] | None) -> tuple[int, int] | None:
    return None if block is None else (block["bits"], block["block"])
