"""Run step programs in numpy: float32 arithmetic, rounded where a buffer is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from alloc_moe.passes.blockwise import BlockFormat, dequantize

Floats = NDArray[np.float32]
Op = Mapping[str, Any]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Interpreter:
    """One batch of sequences that grow by a token a step.

    Args:
        program: The JSON of a step program.
        weights: By name of the initializer.
        sequences: How many there are; all begin empty.
        price: In place of the threshold where there is a dial.
    """

    def __init__(
        self,
        program: Mapping[str, Any],
        weights: Mapping[str, NDArray[Any]],
        *,
        sequences: int = 1,
        price: float | None = None,
    ) -> None:
        self.program, self.weights, self.price = program, weights, price
        self.dtype = DTYPES[program["dtype"]]
        self.cache: dict[int, list[tuple[Floats, Floats]]] = {
            layer["layer"]: [
                (
                    np.zeros((layer["heads"], 0, layer["key_size"]), np.float32),
                    np.zeros((layer["heads"], 0, layer["value_size"]), np.float32),
                )
                for _ in range(sequences)
            ]
            for layer in program["kv"]
        }
        self.kept: list[NDArray[np.bool_]] = []

    def step(self, tokens: Sequence[int]) -> Floats:
        """Return the logits [T, V] after one more token of each sequence."""
        self.buffers: dict[str, Any] = {}
        self.kept = []
        for op in self.program["ops"]:
            made = getattr(self, f"_{op['op']}")(op, np.asarray(tokens))
            if op["op"] != "route":
                assert made.shape == (len(tokens), op.get("n", made.shape[1]))
                made = self._rounded(made)
            self.buffers[op["out"]] = made
        logits: Floats = self.buffers["logits"]
        return logits

    def _rounded(self, values: Floats) -> Floats:
        return values.astype(self.dtype).astype(np.float32)

    def _weight(self, name: str, form: Mapping[str, Any] | None = None) -> Floats:
        weight = self.weights[name]
        if form is None:
            return weight.astype(np.float32)
        assert "zero_points" not in form
        scales = self.weights[form["scales"]].astype(np.float32)
        block = BlockFormat(form["bits"], form["block"])
        packed = weight.reshape(*scales.shape[:-1], -1)
        return dequantize(packed, scales, block)

    def _norm_of(self, norm: Mapping[str, Any] | None, x: Floats) -> Floats:
        if norm is None:
            return x
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(norm["eps"]))
        return self._rounded(x * scale * (norm["offset"] + self._weight(norm["weight"])))

    def _embed(self, op: Op, tokens: NDArray[np.int64]) -> Floats:
        return self._weight(op["weight"], op.get("format"))[tokens] * op.get("scale", 1.0)

    def _linear(self, op: Op, tokens: NDArray[np.int64]) -> Floats:
        first = op.get("x_offset", 0)
        x = self._norm_of(op.get("norm"), self.buffers[op["x"]][:, first : first + op["k"]])
        made = x @ self._weight(op["weight"], op.get("format")).reshape(op["n"], op["k"]).T
        if "bias" in op:
            made += self._weight(op["bias"])
        return made + self.buffers[op["residual"]] if "residual" in op else made

    def _norm(self, op: Op, tokens: NDArray[np.int64]) -> Floats:
        first, size = op.get("x_offset", 0), op.get("size", op["n"])
        x = self.buffers[op["x"]][:, first : first + op["n"]]
        return self._norm_of(op, x.reshape(len(x), -1, size)).reshape(len(x), -1)

    def _add(self, op: Op, tokens: NDArray[np.int64]) -> Floats:
        made: Floats = self.buffers[op["x"]] + self.buffers[op["y"]]
        return made

    def _swiglu(self, op: Op, tokens: NDArray[np.int64]) -> Floats:
        x = self.buffers[op["x"]]
        return _silu(x[:, : op["n"]]) * (self.buffers[op["y"]] if "y" in op else x[:, op["n"] :])

    def _scale_rows(self, op: Op, tokens: NDArray[np.int64]) -> Floats:
        made: Floats = self.buffers[op["x"]] * _sigmoid(self.buffers[op["gate"]])
        return made

    def _attention(self, op: Op, tokens: NDArray[np.int64]) -> Floats:
        heads = {"q": op["heads"], "k": op["kv_heads"], "v": op["kv_heads"]}
        q, k, v = (self._heads(op, name, count) for name, count in heads.items())
        if shared := op.get("k_shared"):
            columns = slice(shared["offset"], shared["offset"] + shared["size"])
            k[..., : shared["size"]] += self.buffers[shared["buffer"]][:, None, columns]
        cache, made = self.cache[op["layer"]], np.zeros_like(q)
        for row, (keys, values) in enumerate(cache):
            at = keys.shape[1]
            rotated_q, rotated_k = (self._rotated(op, part[row], at) for part in (q, k))
            keys = np.concatenate([keys, self._rounded(rotated_k)[:, None]], axis=1)
            values = np.concatenate([values, v[row][:, None]], axis=1)
            cache[row] = keys, values
            group = op["heads"] // op["kv_heads"]
            scores = op["scale"] * np.einsum("hd,hld->hl", rotated_q, keys.repeat(group, 0))
            if "softcap" in op:
                scores = op["softcap"] * np.tanh(scores / op["softcap"])
            made[row] = np.einsum("hl,hld->hd", _softmax(scores), values.repeat(group, 0))
        return made.reshape(len(tokens), -1)

    def _heads(self, op: Op, name: str, count: int) -> Floats:
        """Return queries, keys or values [T, heads, size], normed."""
        first, width = op[name]["offset"], count * op["size"]
        x = self.buffers[op[name]["buffer"]][:, first : first + width]
        norm = op.get(f"{name}_norm")
        if norm is None or norm["whole"]:
            return self._norm_of(norm, x).reshape(len(x), count, -1)
        return self._norm_of(norm, x.reshape(len(x), count, -1))

    def _rotated(self, op: Op, heads: Floats, at: int) -> Floats:
        if "rotary" not in op:
            return heads
        rotary, half = op["rotary"], op["rotary"]["size"] // 2
        cos, sin = (self._weight(rotary[name])[at] for name in ("cos", "sin"))
        made, turned = heads.copy(), heads[:, : 2 * half]
        every = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        first, second = every if rotary["interleaved"] else (slice(half), slice(half, 2 * half))
        made[:, first] = turned[:, first] * cos - turned[:, second] * sin
        made[:, second] = turned[:, second] * cos + turned[:, first] * sin
        return made

    def _route(self, op: Op, tokens: NDArray[np.int64]) -> tuple[Any, Floats]:
        x = self._norm_of(op.get("norm"), self.buffers[op["x"]])
        if "normed" in op:
            self.buffers[op["normed"]] = x
        logits = x @ self._weight(op["weight"]).T
        if "bias" in op:
            logits += self._weight(op["bias"])
        if op["rounded_logits"]:
            logits = self._rounded(logits)
        ids, weights = self._candidates(op, logits)
        order = np.argsort(-weights, axis=1, kind="stable")
        ids, weights = (np.take_along_axis(each, order, 1) for each in (ids, weights))
        keep = self._kept(op["keep"], x, ids, weights)
        self.kept.append(keep)
        made = np.where(keep, weights, 0)
        if op["weights"] == "renorm":
            made *= weights.sum(1, keepdims=True) / made.sum(1, keepdims=True)
        return ids, made

    def _candidates(self, op: Op, logits: Floats) -> tuple[NDArray[np.int64], Floats]:
        """Return the experts [T, top_k] that a router chooses, and their weights."""
        after = op["score"] == "softmax_after_top_k"
        score = {"softmax": _softmax, "sigmoid": _sigmoid}.get(op["score"], lambda given: given)
        scores = score(logits)
        chosen = scores + self._weight(op["selection_bias"]) if "selection_bias" in op else scores
        if "groups" in op:
            groups = op["groups"]
            members = chosen.reshape(len(chosen), groups["count"], -1)
            best = np.sort(members, axis=2)[:, :, -groups["best"] :].sum(2)
            order = np.argsort(-best, axis=1, kind="stable")[:, groups["keep"] :]
            np.put_along_axis(members := members.copy(), order[:, :, None], -np.inf, 1)
            chosen = members.reshape(chosen.shape)
        ids = np.argsort(-chosen, axis=1, kind="stable")[:, : op["top_k"]]
        weights = np.take_along_axis(scores, ids, 1)
        if after:
            weights = _softmax(weights)
        if op["renormalize"]:
            weights = weights / (weights.sum(1, keepdims=True) + op["renormalize_eps"])
        weights = weights * np.float32(op["scale"])
        return ids, self._rounded(weights) if op["rounded"] else weights

    def _kept(
        self, keep: Mapping[str, Any], x: Floats, ids: NDArray[np.int64], weights: Floats
    ) -> NDArray[np.bool_]:
        rows, width = weights.shape
        kept = np.zeros((rows, width), bool)
        if keep["kind"] == "top":
            kept[:, : keep["k"]] = True
            return kept
        kept[:, 0] = True
        if keep["kind"] == "pool":
            order = np.argsort(-weights[:, 1:], axis=None, kind="stable")
            winners = order[: (keep["k"] - 1) * rows]
            others = np.zeros(rows * (width - 1), bool)
            others[winners] = True
            kept[:, 1:] = others.reshape(rows, -1)
            return kept
        scores = self._scores(keep, x, ids, weights)
        threshold = np.float32(keep["threshold"])
        if keep["dial"] and self.price is not None:
            threshold = np.float32(self.price)
        kept[:, 1:] = scores[:, 1:] >= threshold
        if "quota" in keep:
            others = kept[:, 1:].reshape(-1)
            contest = np.where(others, scores[:, 1:].reshape(-1), -np.inf)
            order = np.argsort(-contest, kind="stable")
            room = min(int(np.floor(keep["quota"] * rows)), int(others.sum()))
            won = np.zeros(len(order), bool)
            won[order[:room]] = True
            kept[:, 1:] = won.reshape(rows, -1)
        return kept

    def _scores(
        self, keep: Mapping[str, Any], x: Floats, ids: NDArray[np.int64], weights: Floats
    ) -> Floats:
        match keep["score"]:
            case "weight":
                return weights
            case "ratio":
                return weights / np.maximum(weights[:, :1], np.float32(1e-30))
            case "top-p":
                return -_before(weights)
        added = self._weight(keep["sizes"])[ids] * weights
        if tokens := keep.get("token_sizes"):
            logs = x @ self._weight(tokens["matrix"]) + self._weight(tokens["bias"])
            factors = np.exp(np.clip(logs, -tokens["limit"], tokens["limit"]))
            added *= np.take_along_axis(factors, ids, 1)
        if keep["score"] == "price":
            return added
        assert keep["score"] == "overlap"
        behind = _before(added[:, ::-1])[:, ::-1]
        made: Floats = np.sqrt(added * (added + behind * np.float32(keep["twice_overlap"])))
        return made

    def _experts(self, op: Op, tokens: NDArray[np.int64]) -> Floats:
        x, (ids, weights) = self.buffers[op["x"]], self.buffers[op["routing"]]
        forms, made = op.get("format", {}), np.zeros((len(x), op["n"]), np.float32)
        gate_up = self._weight(op["gate_up"], forms.get("gate_up"))
        down = self._weight(op["down"], forms.get("down"))
        for row, column in np.argwhere(weights != 0):
            expert = ids[row, column]
            hidden = gate_up[expert] @ x[row]
            if "gate_up_bias" in op:
                hidden += self._weight(op["gate_up_bias"])[expert]
            inner = self._rounded(_silu(hidden[0::2]) * hidden[1::2])
            added = down[expert] @ inner
            if "down_bias" in op:
                added += self._weight(op["down_bias"])[expert]
            made[row] += weights[row, column] * added
        if "shared" in op:
            made += self._shared(op["shared"], x)
        return made + self.buffers[op["residual"]] if "residual" in op else made

    def _shared(self, shared: Mapping[str, Any], x: Floats) -> Floats:
        forms, gate_up = shared.get("format", {}), shared["gate_up"]
        width, hidden = shared["intermediate"], x.shape[1]
        if isinstance(gate_up, str):
            weight = self._weight(gate_up, forms.get("gate_up")).reshape(2, width, hidden)
        else:
            given = forms.get("gate_up", {})
            parts = [self._weight(gate_up[name], given.get(name)) for name in ("gate", "up")]
            weight = np.stack([part.reshape(width, hidden) for part in parts])
        inner = self._rounded(_silu(x @ weight[0].T) * (x @ weight[1].T))
        made = inner @ self._weight(shared["down"], forms.get("down")).reshape(hidden, width).T
        if "gate" in shared:
            made *= _sigmoid(x @ self._weight(shared["gate"]).T)
        return made


def _before(x: Floats) -> Floats:
    """Return the sum of the columns before each."""
    sums = np.cumsum(x[:, :-1], axis=1, dtype=np.float32)
    return np.concatenate([np.zeros_like(x[:, :1]), sums], axis=1)


def _sigmoid(x: Floats) -> Floats:
    return (1 / (1 + np.exp(-x))).astype(np.float32)


def _silu(x: Floats) -> Floats:
    return x * _sigmoid(x)


def _softmax(x: Floats) -> Floats:
    raised = np.exp(x - x.max(-1, keepdims=True))
    made: Floats = raised / raised.sum(-1, keepdims=True)
    return made
