"""Requests whose budgets are held, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from alloc_moe.runtime.artifact.plan import PRICE_INPUT
from alloc_moe.runtime.execution.session import ArtifactSession, open_session
from alloc_moe.runtime.serving.batch import Batch, Row, batch_of
from alloc_moe.runtime.text.generation import generate
from alloc_moe.runtime.text.hold import held_budget
from alloc_moe.runtime.text.model import TextModel, load
from alloc_moe.runtime.text.sampling import Sampling

BODY = {"model": "toy", "prompt": "One and two", "temperature": 0, "max_tokens": 20}


def take_prices(path: Path) -> None:
    """Have a toy take a price of each sequence, as --price-per sequence does."""
    model = ir.load(path)
    [price] = [value for value in model.graph.inputs if value.name == PRICE_INPUT]
    users = [node for node in model.graph if price in node.inputs]
    assert price.const_value is not None
    price.const_value = ir.tensor(price.const_value.numpy().reshape(1), name=price.name)
    price.shape = ir.Shape(["prices"])
    column, flat = (
        ir.node("Constant", [], attributes={"value_ints": shape}) for shape in ([-1, 1], [-1, 1])
    )
    sequences = ir.node("Reshape", [price, column.outputs[0]])
    tokens = ir.node("Shape", [model.graph.inputs[0]])
    each = ir.node("Expand", [sequences.outputs[0], tokens.outputs[0]])
    rows = ir.node("Reshape", [each.outputs[0], flat.outputs[0]])
    model.graph.insert_before(users[0], [column, flat, sequences, tokens, each, rows])
    for user in users:
        user.replace_input_with(list(user.inputs).index(price), rows.outputs[0])
    ir.save(model, path)


@pytest.fixture(params=["one price", "a price each"])
def session(
    request: pytest.FixtureRequest, make_toy: Callable[..., Path], tmp_path: Path
) -> ArtifactSession:
    path = make_toy(tmp_path / "out.onnx", dial=True, shared=True, keeps=True)
    if request.param == "a price each":
        take_prices(path)
    session = open_session(path, ep="cpu", count_activations=True)
    assert session.takes_prices is (request.param == "a price each")
    return session


def test_held_rows_that_come_and_go_get_the_tokens_they_get_alone(
    session: ArtifactSession,
) -> None:
    random = np.random.default_rng(3)
    held = held_budget(session, 3)
    rows = [
        Row(tuple(map(int, random.integers(0, 256, size))), Sampling(), hold=held.begin())
        for size in (3, 20, 1, 40, 9)
    ]
    plain = Row((5, 6, 7), Sampling())
    batches: dict[Hashable, Batch] = {}
    for row in [*rows, plain]:
        batch = batches.setdefault(batch_of(session, row), Batch(session, row.price))
        batch.join(row, batch.prefill(row))
        for other in batches.values():
            other.step()
    assert len(batches) == (2 if session.takes_prices else 6)
    batches[batch_of(session, rows[1])].leave(rows[1])
    for batch in batches.values():
        if batch.rows:
            batch.step()
    for row in rows:
        hold = held.begin()
        [ids] = generate(session, [row.prompt_ids], max_new_tokens=len(row.ids), holds=[hold])
        assert row.ids == ids
        assert row.hold is not None
        assert row.executed is not None
        assert (row.hold.tokens, row.hold.executed) == (hold.tokens, hold.executed)
        assert (row.computed, row.executed.sum()) == (hold.tokens, hold.executed)
    [ids] = generate(session, [plain.prompt_ids], max_new_tokens=len(plain.ids))
    assert plain.ids == ids


def test_holding_at_one_price_changes_nothing(session: ArtifactSession) -> None:
    """With all experts there is nothing to steer: the held call is the plain one."""
    prompt = list(range(40, 60))
    hold = held_budget(session, "1.0").begin()
    [held] = generate(session, [prompt], max_new_tokens=12, holds=[hold])
    [plain] = generate(session, [prompt], max_new_tokens=12, price=0.0)
    assert held == plain


@pytest.fixture(scope="module")
def counting(chat_bundle: Path) -> TextModel:
    return load(chat_bundle, ep="cpu", count_activations=True)


def test_a_request_is_held_if_it_asks_for_it(ask: Any, serve: Any, counting: TextModel) -> None:
    server = serve(counting)
    status, answer, _ = ask(server.port, "/v1/completions", {**BODY, "budget": 3, "hold": True})
    assert status == 200
    [expected] = counting.generate(["One and two"], max_new_tokens=20, budget=3, hold=True)
    assert answer["choices"][0]["text"] == expected.text
    report = answer["alloc_moe"]
    assert report["hold"] is True
    assert report["experts_per_token"] == pytest.approx(expected.experts_per_token, abs=1e-3)
    assert server.metric("counted_tokens_total") == 11 + 19
    assert server.metric("executed_experts_total") == round(30 * report["experts_per_token"])


def test_a_server_holds_budgets_unless_a_request_says_otherwise(
    ask: Any, serve: Any, counting: TextModel
) -> None:
    server = serve(counting, hold=True)
    for said, held in (({}, True), ({"hold": False}, False)):
        _, answer, _ = ask(server.port, "/v1/completions", {**BODY, **said})
        assert answer["alloc_moe"]["hold"] is held


def test_what_cannot_be_held_is_refused(ask: Any, serve: Any, bundle: Path) -> None:
    server = serve(load(bundle, ep="cpu", count_activations=True))
    status, answer, _ = ask(server.port, "/v1/completions", {**BODY, "hold": True})
    assert status == 400
    assert "has its budget compiled in, so it can't be held" in answer["error"]["message"]
