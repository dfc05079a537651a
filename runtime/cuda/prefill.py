"""Step program -> what computes a call of many tokens per sequence: kernels, products, copies."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from alloc_moe.runtime.cuda.blocks import Blocks
from alloc_moe.runtime.cuda.cublas import Gemm
from alloc_moe.runtime.cuda.launches import Planner, attention_bytes, heads_per_warp
from alloc_moe.runtime.cuda.records import (
    Copy,
    Launch,
    Operation,
    Places,
    Program,
    Rows,
    last_uses,
)

_WARP = 32
_ATTENTION_WARPS, _ROUTE_WARPS = 8, 8
_TILE, _DEPTH = 128, 64  # of kernels/grouped.cu
_WIDE, _NARROW = (256, 4), (128, 3)  # columns and stages of its tiles
_QUERIES = 64  # of kernels/flash.cu
_PAD_BYTES = 64
_ELEMENT, _FLOAT, _INT = 2, 4, 4  # bytes; prompts are computed in 16 bits

_int, _float, _pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p

Work = Launch | Gemm | Copy


def plan_prefill(
    program: Program, places: Places, rows: Rows, *, most_shared: int
) -> Iterator[Work]:
    """Yield a call's work in order; the last tokens' logits are in ``logits`` [sequences, V].

    Planning takes as long as a tenth of the work, which can begin before all is planned.

    Args:
        program: The step program.
        places: Addresses.
        rows: The call's tokens.
        most_shared: Bytes of shared memory that a block can have.
    """
    planner = _Planner(program, places, rows, most_shared)
    for op in program["ops"]:
        yield from planner.plan(op)


class _Planner(Planner):
    def __init__(self, program: Program, places: Places, rows: Rows, most_shared: int) -> None:
        super().__init__(program, places, _ELEMENT)
        self._given = rows
        self._rows = rows.sequences * rows.width
        self._row_counts: dict[str, int] = {}  # of buffers that have fewer
        self._tile = _WIDE if most_shared >= _tile_bytes(*_WIDE) else _NARROW
        self._blocks = Blocks(program, places, most_shared=most_shared)
        self._last_uses = last_uses(program)
        self._places_of: dict[str, str] = {}  # of buffers that took another one's memory over

    def plan_embed(self, op: Operation) -> Iterable[Work]:
        out, table = self._out(op["out"], self._hidden), self._places.weight(op["weight"])
        ids, scale = _pointer(self._given.ids), _float(op.get("scale") or 1.0)
        if form := op.get("format"):
            kernel, scales = f"embed_blocks<{self._hidden}, {form['bits']}>", self._scales(form)
        else:
            kernel, scales = f"embed<{self._hidden}>", ()
        arguments = (_pointer(out), _pointer(table), *scales, ids, scale)
        yield Launch(kernel, (self._rows, 1, 1), 128, 0, arguments)

    def plan_linear(self, op: Operation) -> Iterable[Work]:
        n, k = op["n"], op["k"]
        if op["out"] == "logits":
            yield from self._logits(op)
            return
        x, pitch = self._x(op)
        if norm := op.get("norm"):
            yield self._normalized(("normed", k), (x, pitch), norm, k)
            x, pitch = self._address("normed"), k
        residual: str | None = op.get("residual")
        if residual is not None and self._last_uses[residual] is op:
            self._places_of[op["out"]] = self._places_of.get(residual, residual)
            residual, add = None, True
        else:
            add = residual is not None
        out = self._out(op["out"], n)
        if residual is not None:
            yield Copy(out, self._address(residual), self._rows * n * _ELEMENT)
        form = op.get("format")
        yield from self._product((out, x, n, k), op["weight"], form, pitch=pitch, add=add)
        if bias := op.get("bias"):
            arguments = (_pointer(out), _pointer(self._places.weight(bias)), _int(n))
            yield self._elementwise("add_bias", n, (*arguments, _int(self._rows)))

    def _product(
        self,
        sizes: tuple[int, int, int, int],
        weight: str,
        form: Mapping[str, Any] | None,
        *,
        pitch: int | None = None,
        add: bool = False,
    ) -> Iterable[Work]:
        """Yield a dense product; ``sizes`` are where out and x are, n and k."""
        out, x, n, k = sizes
        at = self._places.weight(weight)
        gemm = Gemm(out, x, at, self._rows, n, k, pitch or k, add=add)
        yield from self._blocks.product(gemm, weight, form) if form else (gemm,)

    def _logits(self, op: Operation) -> Iterable[Work]:
        """Yield what computes the logits of each sequence's last token."""
        n, k, sequences = op["n"], op["k"], self._given.sequences
        last = self._out("last", k, sequences)
        arguments: tuple[Any, ...] = (
            *map(_pointer, (last, self._address(op["x"]), self._given.counts)),
            *(_int(self._given.width), _int(k)),
        )
        yield Launch("last_rows", (sequences, 1, 1), 256, 0, arguments)
        if norm := op.get("norm"):
            yield self._normalized(("last_normed", k), (last, k), norm, k, rows=sequences)
            last = self._address("last_normed")
        out = self._out("logits", n, sequences)
        if op.get("format"):
            yield self._blocks.head(op, out=out, x=last, tokens=sequences)
            return
        yield Gemm(out, last, self._places.weight(op["weight"]), sequences, n, k, k)
        if bias := op.get("bias"):
            arguments = (_pointer(out), _pointer(self._places.weight(bias)), _int(n))
            yield self._elementwise("add_bias", n, (*arguments, _int(sequences)))

    def plan_norm(self, op: Operation) -> Iterable[Work]:
        size = op.get("size") or op["n"]
        yield self._normalized((op["out"], op["n"]), self._x(op), op, size)

    def _normalized(
        self,
        out: tuple[str, int],
        x: tuple[int, int],
        norm: Mapping[str, Any],
        size: int,
        *,
        rows: int | None = None,
    ) -> Launch:
        to = self._out(*out, rows)
        arguments = (
            *(_pointer(to), _pointer(x[0]), _int(x[1])),
            *self._norm(norm),
        )
        grid = (rows or self._rows, out[1] // size, 1)
        return Launch(f"normalize<{size}>", grid, 256, size * _ELEMENT + _PAD_BYTES, arguments)

    def plan_swiglu(self, op: Operation) -> Iterable[Work]:
        n = op["n"]
        gate, pitch = self._x(op)
        up = self._up(op, gate)
        yield self._gated(self._out(op["out"], n), gate, up, pitch, n)

    def _gated(self, out: int, gate: int, up: int, pitch: int, n: int) -> Launch:
        pointers = (_pointer(out), _pointer(gate), _pointer(up))
        return self._elementwise("swiglu", n, (*pointers, _int(pitch), _int(n), _int(self._rows)))

    def plan_add(self, op: Operation) -> Iterable[Work]:
        n = self._widths[op["x"]]
        x, y = self._address(op["x"]), self._address(op["y"])
        pointers = (_pointer(self._out(op["out"], n)), _pointer(x), _pointer(y))
        yield self._elementwise("add", n, (*pointers, _int(n * self._rows)))

    def plan_scale_rows(self, op: Operation) -> Iterable[Work]:
        n = self._widths[op["x"]]
        x, gate = self._address(op["x"]), self._address(op["gate"])
        yield self._scaled(self._out(op["out"], n), x, gate, n)

    def _scaled(self, out: int, x: int, gate: int, n: int) -> Launch:
        pointers = (_pointer(out), _pointer(x), _pointer(gate))
        return self._elementwise("scale_rows", n, (*pointers, _int(n), _int(self._rows)))

    def _elementwise(self, kernel: str, n: int, arguments: tuple[Any, ...]) -> Launch:
        blocks = min(math.ceil(n * self._rows / 256), 1 << 14)
        return Launch(kernel, (blocks, 1, 1), 256, 0, arguments)

    def plan_attention(self, op: Operation) -> Iterable[Work]:
        heads, kv_heads, size, given = op["heads"], op["kv_heads"], op["size"], self._given
        query, query_pitch = self._part(op["q"])
        keys, values = given.keys[op["layer"]], given.values[op["layer"]]
        lengths, counts = _pointer(given.lengths), _pointer(given.counts)
        sizes = (_int(given.width), _int(heads), _int(kv_heads), _int(given.capacity))
        value, value_pitch = self._part(op["v"])
        arguments = (
            *self._heads(op["q"], op.get("q_norm"), heads, size),
            *self._heads(op["k"], op.get("k_norm"), kv_heads, size),
            *(_pointer(value), _int(value_pitch), *self._shared_keys(op), *self._rotary(op)),
            *(_pointer(keys), _pointer(values), lengths, counts, *sizes),
        )
        blocks = math.ceil((heads + kv_heads) / (_ATTENTION_WARPS * heads_per_warp(size)))
        whole = (op.get("q_norm") or {}).get("whole")  # then blocks read what others rotate
        grid = (self._rows, 1 if whole else blocks, 1)
        yield Launch(f"append<{size}>", grid, _ATTENTION_WARPS * _WARP, 0, arguments)
        out = self._out(op["out"], heads * size)
        arguments = (
            *(_pointer(out), _pointer(query), _int(query_pitch), _pointer(keys), _pointer(values)),
            *(lengths, counts, *sizes, _float(op["scale"]), _float(op.get("softcap") or 0.0)),
        )
        grid = (math.ceil(given.width / _QUERIES), heads, given.sequences)
        yield Launch(f"flash<{size}>", grid, 128, attention_bytes(size), arguments)

    def plan_route(self, op: Operation) -> Iterable[Work]:
        experts, candidates, k = op["experts"], op["top_k"], self._widths[op["x"]]
        x = self._address(op["x"])
        if norm := op.get("norm"):
            name = op.get("normed") or "normed"
            yield self._normalized((name, k), (x, k), norm, k)
            x = self._address(name)
        logits = self._raw("router_logits", experts * _FLOAT)
        weight = self._places.weight(op["weight"])
        yield Gemm(logits, x, weight, self._rows, experts, k, k, floats=True)
        logs = 0
        if tokens := op["keep"].get("token_sizes"):
            logs = self._raw("token_logs", experts * _FLOAT)
            weight = self._places.transposed(tokens["matrix"], experts)
            yield Gemm(logs, x, weight, self._rows, experts, k, k, floats=True)
        if gate := self._shared.get(op["out"], {}).get("gate"):
            out = self._out("shared_gate", 1)
            yield Gemm(out, x, self._places.weight(gate), self._rows, 1, k, k)
        ids, weights, places = self._pairs(candidates)
        counts = self._places.zeros("rows.expert_counts", experts * _INT)
        offsets = self._places.buffer("rows.offsets", (experts + 1) * _INT)
        arguments = (
            *map(_pointer, (ids, weights, places, counts, logits, logs, self._places.router(op))),
            _pointer(self._given.counts),
            *(_int(bool(op.get("rounded_logits"))), _int(self._given.width), _int(self._rows)),
        )
        padded = math.ceil(experts / _WARP) * _WARP
        grid = (math.ceil(self._rows / _ROUTE_WARPS), 1, 1)
        yield Launch(f"route_rows<{padded}>", grid, _ROUTE_WARPS * _WARP, 0, arguments)
        arguments = (_pointer(offsets), _pointer(counts), _int(experts))
        yield Launch("sum_counts", (1, 1, 1), _WARP, 0, arguments)
        size = self._rows * candidates
        arguments = (
            *map(_pointer, (*self._placed(candidates), places, ids, weights, offsets)),
            *(_int(candidates), _int(size)),
        )
        yield Launch("place_pairs", (math.ceil(size / 256), 1, 1), 256, 0, arguments)

    def _pairs(self, candidates: int) -> tuple[int, int, int]:
        names = ("pair_ids", "pair_values", "places")
        ids, weights, places = (self._raw(name, candidates * _INT) for name in names)
        return ids, weights, places

    def _placed(self, candidates: int) -> tuple[int, int]:
        rows, weights = (
            self._raw(name, candidates * _INT) for name in ("pair_rows", "pair_weights")
        )
        return rows, weights

    def plan_experts(self, op: Operation) -> Iterable[Work]:
        route, inner, k = self._routes[op["routing"]], op["intermediate"], self._widths[op["x"]]
        candidates, experts, n = route["top_k"], route["experts"], self._hidden
        keep = route["keep"]
        most = self._rows * (keep["k"] if keep["kind"] == "top" else candidates)
        tiles = min(math.ceil(most / _TILE) + experts, most)
        hidden = self._raw("experts", candidates * inner * _ELEMENT)
        pairs = self._raw("pairs", candidates * n * _ELEMENT)
        offsets = _pointer(self._places.buffer("rows.offsets", (experts + 1) * _INT))
        rows, weights = map(_pointer, self._placed(candidates))
        x = self._address(op["x"])
        arguments: tuple[Any, ...] = (_pointer(hidden), _pointer(x), offsets, rows, weights)
        yield self._grouped(op, "gate_up", (2 * inner, k), (tiles, inner), arguments)
        arguments = (_pointer(pairs), _pointer(hidden), offsets, weights)
        yield self._grouped(op, "down", (n, inner), (tiles, n), arguments)
        ids, _, places = self._pairs(candidates)
        residual = self._address(op["residual"]) if op.get("residual") else 0
        out = self._out(op["out"], n)
        arguments = (
            *map(_pointer, (out, pairs, ids, places, residual)),
            *(_int(candidates), _int(n)),
        )
        yield Launch("sum_pairs", (self._rows, 1, 1), 256, 0, arguments)
        if shared := op.get("shared"):
            yield from self._shared_expert(shared, x, k, out)

    def _grouped(
        self,
        op: Operation,
        part: str,
        sizes: tuple[int, int],
        grid: tuple[int, int],
        rows: tuple[Any, ...],
    ) -> Launch:
        """Return the product of the experts' rows with their weights [n, k], being ``sizes``.

        ``grid`` has the most tiles of rows, and what ``n`` is in the kernel's last argument.
        """
        form, (n, k), (columns, stages) = (op.get("format") or {}).get(part), sizes, self._tile
        kernel, shared = f"grouped_{part}<{k}, {columns}, {stages}>", _tile_bytes(*self._tile)
        if form:
            tile, columns, shared = self._blocks.expert_tile(form["bits"])
            kernel = f"grouped_{part}_blocks<{k}, {tile}>"
        arguments = (
            *(
                *rows,
                self._weight(op[part]),
                *self._scales(form),
                self._weight(op.get(f"{part}_bias")),
            ),
            *(_int(self._routes[op["routing"]]["experts"]), _int(grid[1])),
        )
        return Launch(kernel, (math.ceil(n / columns), grid[0], 1), 256, shared, arguments)

    def _scales(self, form: Mapping[str, Any] | None) -> tuple[Any, ...]:
        return (self._weight(form["scales"]), _int(form["block"])) if form else ()

    def _shared_expert(self, shared: Mapping[str, Any], x: int, k: int, out: int) -> Iterable[Work]:
        inner, given, forms = shared["intermediate"], shared["gate_up"], shared.get("format") or {}
        form, product = forms.get("gate_up"), self._product
        if isinstance(given, str):
            gate = self._out("shared_gate_up", 2 * inner)
            up, pitch = gate + inner * _ELEMENT, 2 * inner
            yield from product((gate, x, 2 * inner, k), given, form)
        else:
            gate, up = self._out("shared_gates", inner), self._out("shared_ups", inner)
            pitch = inner
            for to, part in ((gate, "gate"), (up, "up")):
                yield from product((to, x, inner, k), given[part], (form or {}).get(part))
        hidden = self._out("shared_hidden", inner)
        yield self._gated(hidden, gate, up, pitch, inner)
        if shared.get("gate"):
            yield self._scaled(hidden, hidden, self._address("shared_gate"), inner)
        down = (out, hidden, self._hidden, inner)
        yield from product(down, shared["down"], forms.get("down"), add=True)

    def _out(self, name: str, width: int, rows: int | None = None) -> int:
        self._widths[name] = width
        if rows is not None:
            self._row_counts[name] = rows
        return self._address(name)

    def _address(self, name: str) -> int:
        rows = self._row_counts.get(name, self._rows)
        return self._raw(self._places_of.get(name, name), self._widths[name] * _ELEMENT, rows)

    def _raw(self, name: str, size: int, rows: int | None = None) -> int:
        return self._places.buffer(f"rows.{name}", (self._rows if rows is None else rows) * size)


def _tile_bytes(columns: int, stages: int) -> int:
    return stages * (_TILE + columns) * _DEPTH * _ELEMENT + 1024
