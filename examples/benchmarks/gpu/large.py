"""Models of real size: their budgets' times, and the captured step against onnxruntime's."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from artifacts import (
    FRACTIONS,
    Sizes,
    decode_bytes,
    decode_kept,
    decode_seconds,
    marked,
    open_artifact,
    prefill_seconds,
    price_for,
    prompt_kept,
    random_tokens,
    release,
)
from checks import PROMPT, TOLERANCES, compare, greedy, launched_one_by_one, same_tokens
from fill import fill

from alloc_moe.runtime.execution.session import ArtifactSession

Named = Iterator[tuple[str, Callable[[], dict[str, Any]]]]

_CALIBRATION = 256  # tokens that prices are found on
_KINDS = ("decode", "batch", "prefill")
_CAPTURED, _STOCK, _PLAIN = "captured", "onnxruntime", "plain top-k"
_LAUNCHED = "captured or not"


def large_model(
    description: dict[str, Any], graphs: Path, work: Path, device: str, sizes: Sizes
) -> Named:
    """Yield name and function of a model's measurements."""
    model = _Model(description, graphs, work, device, sizes)
    name = description["name"]
    budgets = budgets_of(description)
    for kind in _KINDS:
        for budget in budgets:
            time = functools.partial(model.time, kind, "price", budget, capture=True)
            yield f"{name}/{kind}/{budget}/{_CAPTURED}", time
    for budget in ("full", "half"):
        check = functools.partial(model.check_logits, budget)
        yield f"{name}/logits/{budget}/{_CAPTURED}", check
    if "quarter" in budgets:  # the model that all is measured of
        yield f"{name}/tokens/full/{_CAPTURED}", model.check_tokens
        yield f"{name}/tokens/full/{_LAUNCHED}", model.check_capture
    for budget in ("full", "half"):
        time = functools.partial(model.time, "decode", "price", budget, capture=False)
        yield f"{name}/decode/{budget}/{_STOCK}", time
    for budget in budgets:
        for kind in _KINDS:
            time = functools.partial(model.time, kind, budget, budget, capture=False)
            yield f"{name}/{kind}/{budget}/{_PLAIN}", time


def budgets_of(description: dict[str, Any]) -> list[str]:
    """Return the budgets that are measured: those of the plain operator's graphs."""
    return [budget for budget in FRACTIONS if budget in description["plans"]]


class _Model:
    """A model's artifacts, of which only those in use are loaded."""

    def __init__(
        self, description: dict[str, Any], graphs: Path, work: Path, device: str, sizes: Sizes
    ) -> None:
        self._description, self._device, self._sizes = description, device, sizes
        self._graphs, self._work = graphs, work / description["name"]
        self._sessions: dict[tuple[str, bool], ArtifactSession] = {}

    def time(self, kind: str, plan: str, budget: str, *, capture: bool) -> dict[str, Any]:
        """Time steps, steps of a batch, or prompts."""
        known = self._prepared().get(budget) if plan == "price" else None
        price = known["price"] if known else None
        session = self._session(plan, capture)
        sizes, described = self._sizes, self._description
        plain = [float(max(layer["k"] * FRACTIONS[budget], 1)) for layer in described["layers"]]
        kept = known[kind] if known else plain
        experts = f"{np.mean(kept):.2f} experts per token and layer"
        if kind == "prefill":
            seconds, new, logits = prefill_seconds(session, sizes, price=price)
            size = decode_bytes(described, plan, kept, batch=sizes.prompt)
            note = f"{experts}; prompts not seen before {1e3 * new:.1f} ms"
        else:
            batch = sizes.batch if kind == "batch" else 1
            seconds, logits = decode_seconds(session, sizes, batch=batch, price=price)
            size, note = decode_bytes(described, plan, kept, batch=batch), experts
        result = {"value": 1e3 * seconds, "unit": "ms", "bytes": size, "note": note}
        result["ok"] = bool(np.isfinite(logits).all())
        return marked(result, session) if capture and kind != "prefill" else result

    def check_logits(self, budget: str) -> dict[str, Any]:
        """Compare with onnxruntime's CUDA: alone, in left-padded batches, after a long prompt."""
        price = self._prepared()[budget]["price"]
        pair = self._session("price", True), self._session("price", False)
        together = compare(*pair, batch=1, steps=32, price=price)
        long = self._sizes.prompt // 2
        for batch, steps, columns in ((4, 12, PROMPT), (16, 12, PROMPT), (1, 4, long)):
            each = compare(*pair, batch=batch, steps=steps, price=price, columns=columns)
            together.errors += each.errors
            together.flips += each.flips
            together.is_finite &= each.is_finite
        return together.verdict(TOLERANCES[self._description["dtype"]])

    def check_tokens(self) -> dict[str, Any]:
        """Compare greedy tokens with and without capture: alone, and in left-padded batches."""
        pair = self._session("price", True), self._session("price", False)
        price, count = self._prepared()["full"]["price"], self._sizes.tokens
        given = compare(*pair, batch=1, steps=count, price=price)
        found = []
        for batch, length in ((1, count), (4, count // 10), (16, count // 10)):
            options: Any = {"batch": batch, "price": price}
            both = [greedy(session, length, **options) for session in pair]
            equal, of = same_tokens(*both)
            found.append(f"batch {batch}: {equal} of {of} until the first that differs")
        verdict = given.verdict(TOLERANCES[self._description["dtype"]])
        equal = len(given.errors) - len(given.flips)
        note = (
            f"of {len(given.errors)}, each after the same tokens; on their own {'; '.join(found)}"
        )
        return {"value": equal, "unit": "tokens equal", "ok": verdict["ok"], "note": note}

    def check_capture(self) -> dict[str, Any]:
        """Compare greedy tokens of our kernels captured and launched one by one: all are equal."""
        session, price = self._session("price", True), self._prepared()["full"]["price"]
        equal = of = 0
        for batch, length in ((1, self._sizes.tokens), (16, self._sizes.tokens // 10)):
            replayed = greedy(session, length, batch=batch, price=price)
            with launched_one_by_one(session):
                launched = greedy(session, length, batch=batch, price=price)
            each = same_tokens(replayed, launched)
            equal, of = equal + each[0], of + each[1]
        return {"value": equal, "unit": "tokens equal", "ok": equal == of, "note": f"of {of}"}

    def _session(self, plan: str, capture: bool) -> ArtifactSession:
        key = (plan, capture)
        if key not in self._sessions:
            self._drop({(plan, True), (plan, False)})
            self._sessions[key] = open_artifact(self._path(plan), self._device, capture=capture)
        return self._sessions[key]

    def _drop(self, kept: set[tuple[str, bool]]) -> None:
        for key in set(self._sessions) - kept:
            del self._sessions[key]
        release()

    def _path(self, plan: str) -> Path:
        return fill(self._description, self._graphs, self._work)[plan]

    def _prepared(self) -> dict[str, dict[str, Any]]:
        """Return every budget's price and the experts that run at it, in this or another process.

        Counted by a session of its own, as counting takes time.
        """
        path = self._path("price")
        notes = path.with_suffix(".prices.json")
        if notes.exists():
            found: dict[str, dict[str, Any]] = json.loads(notes.read_text("utf-8"))
            return found
        counting = open_artifact(path, self._device, capture=False, count=True)
        ids = random_tokens(counting, 1, min(_CALIBRATION, self._sizes.prompt))
        found = {}
        sizes = self._sizes
        for budget in budgets_of(self._description):
            price = price_for(counting, FRACTIONS[budget], ids)
            found[budget] = {
                "price": price,
                "decode": decode_kept(counting, sizes, batch=1, price=price),
                "batch": decode_kept(counting, sizes, batch=sizes.batch, price=price),
                "prefill": prompt_kept(counting, sizes, price=price),
            }
        notes.write_text(json.dumps(found), "utf-8")
        del counting
        release()
        return found
