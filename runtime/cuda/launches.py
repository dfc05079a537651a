"""Step program -> kernel launches, for a number of sequences and a capacity of the cache.

Nothing here needs a GPU: addresses are integers, so the same launches run in an emulation.
"""

from __future__ import annotations

import abc
import ctypes
import math
from collections.abc import Iterable, Mapping
from typing import Any

from alloc_moe.runtime.cuda.records import Launch, Memory, Operation, Places, Program, Shape
from alloc_moe.runtime.cuda.routers import MOST_TOKENS, Routing, most_kept

_WARP = 32
_ROUTE_WARPS, _ATTENTION_WARPS, _GATE_UP_WARPS, _DOWN_WARPS = 8, 8, 4, 8
_PAD_BYTES = 64  # ROW_PAD of kernels/linear.cu
_MOST_HEAD_ELEMENTS = 512  # of the query heads that one block attends with
_FEWEST_POSITIONS, _ROUND = 64, 32  # of a block of the attention; how many it sees at once
_GROUP = 8  # tokens of one product
_PROMPT_POSITIONS, _DEPTH = 64, 64  # of kernels/flash.cu

_int, _float, _pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
_NOWHERE = _pointer(0)


def plan_launches(program: Program, memory: Memory, shape: Shape) -> list[Launch]:
    """Return a step's launches in order; the buffer ``logits`` [tokens, vocabulary] has logits."""
    planner = _Planner(program, memory, shape)
    return [launch for op in program["ops"] for launch in planner.plan(op)]


class Planner(abc.ABC):
    """What plans of steps and of prompts share: the program's buffers, and arguments of kernels.

    A subclass has a method ``plan_OP`` for each operation, and says where buffers are.
    """

    def __init__(self, program: Program, places: Places, element: int) -> None:
        self._places, self._element = places, element
        self._hidden = int(program["hidden"])
        self._widths: dict[str, int] = {}
        self._routes = {op["out"]: op for op in program["ops"] if op["op"] == "route"}
        self._shared = {
            op["routing"]: op["shared"]
            for op in program["ops"]
            if op["op"] == "experts" and op.get("shared")
        }

    def plan(self, op: Operation) -> Iterable[Any]:
        """Yield the work of one operation; operations are given in order."""
        planned: Iterable[Any] = getattr(self, f"plan_{op['op']}")(op)
        return planned

    @abc.abstractmethod
    def _address(self, name: str) -> int:
        """Return where a buffer is whose width is known."""

    def _part(self, part: Mapping[str, Any]) -> tuple[int, int]:
        """Return where a part of row buffers begins, and how far rows are apart."""
        buffer, offset = part["buffer"], part.get("offset") or 0
        return self._address(buffer) + offset * self._element, self._widths[buffer]

    def _x(self, op: Operation) -> tuple[int, int]:
        return self._part({"buffer": op["x"], "offset": op.get("x_offset")})

    def _up(self, op: Operation, gate: int) -> int:
        """Return where a gated operation's second factor is: in ``y``, or behind the gate."""
        return self._address(op["y"]) if op.get("y") else gate + op["n"] * self._element

    def _heads(
        self, part: Mapping[str, Any], norm: Mapping[str, Any] | None, heads: int, size: int
    ) -> tuple[Any, ...]:
        """Return the arguments that say where new queries or keys are, and how they are normed."""
        given = _of_part(self._part(part))
        if not norm:
            return (*given, _NOWHERE, _float(0.0), _int(size))
        normed = heads * size if norm.get("whole") else size
        return (*given, self._weight(norm["weight"]), _float(norm["eps"]), _int(normed))

    def _shared_keys(self, op: Operation) -> tuple[Any, ...]:
        shared = op.get("k_shared")
        if not shared:
            return _NOWHERE, _int(0), _int(0)
        return (*_of_part(self._part(shared)), _int(shared["size"]))

    def _rotary(self, op: Operation) -> tuple[Any, ...]:
        rotary = op.get("rotary") or {}
        return (
            *(self._weight(rotary.get("cos")), self._weight(rotary.get("sin"))),
            *(_int(rotary.get("size", 0)), _int(bool(rotary.get("interleaved")))),
        )

    def _norm(self, norm: Mapping[str, Any] | None) -> tuple[Any, ...]:
        if not norm:
            return _NOWHERE, _float(0.0), _float(0.0)
        weight, offset = self._weight(norm["weight"]), _float(norm.get("offset") or 0.0)
        return weight, _float(norm["eps"]), offset

    def _weight(self, name: str | None) -> Any:
        return _pointer(self._places.weight(name)) if name else _NOWHERE


class _Planner(Planner):
    def __init__(self, program: Program, memory: Memory, shape: Shape) -> None:
        super().__init__(program, memory, shape.element)
        self._memory, self._shape = memory, shape
        self._groups = math.ceil(shape.tokens / _GROUP)

    def plan_embed(self, op: Operation) -> Iterable[Launch]:
        out, table = self._out(op, self._hidden), self._weight(op["weight"])
        ids, scale = _pointer(self._memory.ids), _float(op.get("scale") or 1.0)
        kernel = f"embed<{self._hidden}>"
        arguments: tuple[Any, ...] = (out, table, ids, scale)
        if block := op.get("format"):
            kernel = f"embed_blocks<{self._hidden}, {block['bits']}>"
            scales = (self._weight(block["scales"]), _int(block["block"]))
            arguments = (out, table, *scales, ids, scale)
        yield Launch(kernel, (self._shape.tokens, 1, 1), 128, 0, arguments)

    def plan_linear(self, op: Operation) -> Iterable[Launch]:
        n, k, norm = op["n"], op["k"], op.get("norm")
        bits, scales, block = self._format(op.get("format"))
        tiles = math.ceil(n / 16)
        warps = 4 if tiles >= 2 * self._shape.multiprocessors else 8
        kernel = f"linear<{k}, {bits}, {self._groups}, {warps}, {_bool(norm)}>"
        arguments = (
            *(self._out(op, n), *_of_part(self._x(op)), self._weight(op["weight"]), scales, block),
            *(self._weight(op.get("bias")), self._rows(op.get("residual"))),
            *(*self._norm(norm), _int(n), _int(self._shape.tokens)),
        )
        grid = (min(tiles, 4 * self._shape.multiprocessors), 1, 1)
        yield Launch(kernel, grid, warps * _WARP, self._normed(k) if norm else 0, arguments)

    def plan_norm(self, op: Operation) -> Iterable[Launch]:
        n, size = op["n"], op.get("size") or op["n"]
        arguments = (self._out(op, n), *_of_part(self._x(op)), *self._norm(op))
        shared = size * self._element + _PAD_BYTES
        grid = (self._shape.tokens, n // size, 1)
        yield Launch(f"normalize<{size}>", grid, 256, shared, arguments)

    def plan_swiglu(self, op: Operation) -> Iterable[Launch]:
        n, tokens = op["n"], self._shape.tokens
        gate, pitch = self._x(op)
        rows = (self._out(op, n), _pointer(gate), _pointer(self._up(op, gate)))
        arguments = (*rows, _int(pitch), _int(n), _int(tokens))
        yield _elementwise("swiglu", n * tokens, arguments)

    def plan_add(self, op: Operation) -> Iterable[Launch]:
        n = self._widths[op["x"]]
        rows = (self._out(op, n), self._rows(op["x"]), self._rows(op["y"]))
        size = n * self._shape.tokens
        yield _elementwise("add", size, (*rows, _int(size)))

    def plan_scale_rows(self, op: Operation) -> Iterable[Launch]:
        n, tokens = self._widths[op["x"]], self._shape.tokens
        rows = (self._out(op, n), self._rows(op["x"]), self._rows(op["gate"]))
        yield _elementwise("scale_rows", n * tokens, (*rows, _int(n), _int(tokens)))

    def plan_attention(self, op: Operation) -> Iterable[Launch]:
        heads, kv_heads, size = op["heads"], op["kv_heads"], op["size"]
        each = heads_per_block(heads // kv_heads, size)
        blocks, shape = heads // each, self._shape
        splits, chunk = split_positions(
            shape.capacity, blocks=blocks * shape.tokens, multiprocessors=shape.multiprocessors
        )
        partial = shape.tokens * heads * splits * (size + 2) * 4
        arguments = (
            self._out(op, heads * size),
            _pointer(self._memory.keys[op["layer"]]),
            _pointer(self._memory.values[op["layer"]]),
            *self._heads(op["q"], op.get("q_norm"), heads, size),
            *self._heads(op["k"], op.get("k_norm"), kv_heads, size),
            *_of_part(self._part(op["v"])),
            *(*self._shared_keys(op), *self._rotary(op)),
            _pointer(self._memory.lengths),
            _pointer(self._memory.buffer("alloc_moe.partial", partial)),
            _pointer(self._memory.zeros("alloc_moe.done", MOST_TOKENS * blocks * 4)),
            *(_int(heads), _int(kv_heads), _int(shape.capacity), _int(chunk)),
            *(_float(op["scale"]), _float(op.get("softcap") or 0.0)),
        )
        kernel = f"attention<{size}, {each}>"
        yield Launch(kernel, (blocks, splits, shape.tokens), _ATTENTION_WARPS * _WARP, 0, arguments)

    def plan_route(self, op: Operation) -> Iterable[Launch]:
        experts, norm, k = op["experts"], op.get("norm"), self._widths[op["x"]]
        padded = math.ceil(experts / _WARP) * _WARP
        normed, gate = op.get("normed"), self._shared.get(op["out"], {}).get("gate")
        normed_rows = self._out({"out": normed}, k) if normed and norm else _NOWHERE
        maps = bool(op["keep"].get("token_sizes"))
        logits = MOST_TOKENS * padded * 4 * (1 + maps)
        arguments = (
            self._routing(),
            _pointer(self._memory.buffer("alloc_moe.router_logits", logits)),
            normed_rows,
            _pointer(self._memory.zeros("alloc_moe.arrived", 4)),
            *(self._rows(op["x"]), self._weight(op["weight"]), self._weight(op.get("bias"))),
            *(*self._norm(norm), self._weight(gate)),
            *(_pointer(self._memory.router(op)), _pointer(self._memory.real)),
            *(_int(bool(op.get("rounded_logits"))), _int(self._shape.tokens)),
        )
        kernel = f"route<{k}, {self._groups}, {padded}, {_bool(norm)}>"
        grid = (math.ceil(experts / 16) * (1 + maps) + bool(gate), 1, 1)
        shared = self._normed(k) if norm else 0
        yield Launch(kernel, grid, _ROUTE_WARPS * _WARP, shared, arguments)

    def plan_experts(self, op: Operation) -> Iterable[Launch]:
        tokens, inner, k = self._shape.tokens, op["intermediate"], self._widths[op["x"]]
        formats, shared = op.get("format") or {}, op.get("shared") or {}
        kept, shared_inner = most_kept(self._routes[op["routing"]], tokens), 0
        hidden = kept * tokens * inner * self._element
        hidden_rows = _pointer(self._memory.buffer("alloc_moe.experts", hidden))
        shared_rows = _NOWHERE
        if shared:
            shared_inner = shared["intermediate"]
            shared_rows = self._out({"out": "alloc_moe.shared_expert"}, shared_inner)
        gate, up, shared_bits = self._shared_gate_up(shared, k)
        bits, scales, block = self._format(formats.get("gate_up"))
        arguments = (
            *(hidden_rows, shared_rows, self._rows(op["x"]), self._routing()),
            *(self._weight(op["gate_up"]), scales, self._weight(op.get("gate_up_bias"))),
            *(block, _int(inner), *gate[:1], *up[:1], *gate[1:], *up[1:]),
            *(_int(shared_bits[1]), _int(shared_inner), _int(bool(shared.get("gate")))),
            _int(tokens),
        )
        yield Launch(
            f"gate_up<{k}, {bits}, {shared_bits[0]}, {self._groups}, {_GATE_UP_WARPS}>",
            (shared_inner // 8 + kept * (inner // 8), 1, 1),
            _GATE_UP_WARPS * _WARP,
            0,
            arguments,
        )
        yield self._down(op, (hidden_rows, shared_rows))

    def _down(self, op: Operation, rows: tuple[Any, Any]) -> Launch:
        formats, shared, n = op.get("format") or {}, op.get("shared") or {}, self._hidden
        bits, scales, block = self._format(formats.get("down"))
        shared_format = (shared.get("format") or {}).get("down")
        shared_bits, shared_scales, shared_block = self._format(shared_format)
        arguments = (
            *(self._out(op, n), *rows, self._routing(), self._weight(op["down"]), scales),
            *(self._weight(op.get("down_bias")), block),
            *(self._weight(shared.get("down")), shared_scales, shared_block),
            *(self._rows(op.get("residual")), _int(n), _int(self._shape.tokens)),
        )
        sizes = f"{op['intermediate']}, {shared.get('intermediate', 0)}, {bits}, {shared_bits}"
        kernel = f"down<{sizes}, {self._groups}, {_DOWN_WARPS}>"
        return Launch(kernel, (n // 16, 1, 1), _DOWN_WARPS * _WARP, 0, arguments)

    def _shared_gate_up(
        self, shared: Mapping[str, Any], k: int
    ) -> tuple[tuple[Any, Any], tuple[Any, Any], tuple[int, int]]:
        """Return values and scales of gate and of up, and their bits and block."""
        if not shared:
            return (_NOWHERE, _NOWHERE), (_NOWHERE, _NOWHERE), (0, 0)
        given, forms = shared["gate_up"], (shared.get("format") or {}).get("gate_up") or {}
        block = forms if isinstance(given, str) else forms.get("gate") or {}
        bits, size = block.get("bits", 0), block.get("block", 0)
        if isinstance(given, str):  # one matrix, gate first
            scales = block.get("scales")
            rows = shared["intermediate"] * k
            apart = rows * bits // 8 if bits else rows * self._element
            first = self._memory.weight(given)
            gate = (_pointer(first), self._weight(scales))
            up_scales = _NOWHERE
            if scales:
                offset = rows // size * self._element
                up_scales = _pointer(self._memory.weight(scales) + offset)
            return gate, (_pointer(first + apart), up_scales), (bits, size)
        parts = tuple(
            (self._weight(given[name]), self._weight((forms.get(name) or {}).get("scales")))
            for name in ("gate", "up")
        )
        return parts[0], parts[1], (bits, size)

    def _out(self, op: Operation, width: int) -> Any:
        self._widths[op["out"]] = width
        return self._rows(op["out"])

    def _rows(self, name: str | None) -> Any:
        return _NOWHERE if name is None else _pointer(self._address(name))

    def _address(self, name: str) -> int:
        return self._memory.buffer(name, MOST_TOKENS * self._widths[name] * self._element)

    def _routing(self) -> Any:
        # A layer's experts have run before the next layer's router writes.
        return _pointer(self._memory.buffer("alloc_moe.routing", ctypes.sizeof(Routing)))

    def _format(self, block: Mapping[str, Any] | None) -> tuple[int, Any, Any]:
        if not block:
            return 0, _NOWHERE, _int(0)
        return block["bits"], self._weight(block["scales"]), _int(block["block"])

    def _normed(self, k: int) -> int:
        return self._shape.tokens * (k * self._element + _PAD_BYTES)


def heads_per_block(group: int, size: int) -> int:
    """Return how many query heads of a key/value head's group one block attends with."""
    most = max(1, _MOST_HEAD_ELEMENTS // size)
    return max(each for each in range(1, group + 1) if group % each == 0 and each <= most)


def heads_per_warp(size: int) -> int:
    """Return how many heads of 16-bit elements a warp rotates at once, 16 bytes to a lane."""
    vectors = size * 2 // 16
    return 1 if vectors & (vectors - 1) else max(1, _WARP // vectors)


def attention_bytes(size: int) -> int:
    """Return the shared memory of a block that attends to a prompt with heads of a size."""
    tile = _PROMPT_POSITIONS * math.ceil(size / _DEPTH) * _DEPTH * 2
    return 4 * tile + 1024


def split_positions(capacity: int, *, blocks: int, multiprocessors: int) -> tuple[int, int]:
    """Return into how many parts the cache is split, and the positions of each."""
    wanted = max(1, min(64, math.ceil(4 * multiprocessors / blocks)))
    chunk = max(_FEWEST_POSITIONS, math.ceil(math.ceil(capacity / wanted) / _ROUND) * _ROUND)
    return math.ceil(capacity / chunk), chunk


def _of_part(part: tuple[int, int]) -> tuple[Any, Any]:
    address, pitch = part
    return _pointer(address), _int(pitch)


def _elementwise(kernel: str, size: int, arguments: tuple[Any, ...]) -> Launch:
    return Launch(kernel, (math.ceil(size / 256), 1, 1), 256, 0, arguments)


def _bool(value: object) -> str:
    return "true" if value else "false"
