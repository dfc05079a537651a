"""A price per sequence: artifacts compiled for it, and budgets that several of them hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.verify import parity as verify
from alloc_moe.compiler.verify.parity import verify_artifact
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.calls import Output
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.text.generation import generate
from alloc_moe.runtime.text.hold import executed_by_token, held_budget, run_held

Models = Callable[[str], MoeModel]
Graphs = Callable[[str], ir.Model]
Plans = Callable[..., AllocationPlan]
Written = Callable[..., Path]

FAMILIES = ("olmoe", "deepseek_v2", "qwen3_next")  # caches: keys and values, latents, states


@pytest.mark.parametrize("family", FAMILIES)
def test_artifacts_with_a_price_per_sequence_agree_with_pytorch(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
    family: str,
) -> None:
    moe = moe_model(family)
    plan = score_plan(moe, "price", overlap=0.5)
    path = written(exported(family), plan, price_per="sequence")
    assert verify_artifact(path, moe, plan, token_ids, dtype="float32").tokens == 108


def test_they_are_verified_by_segments_too(
    checkpoint: Callable[[str], Path],
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify, "SEGMENT_BYTES", 1)
    moe = load_model(str(checkpoint("olmoe")), offload="always")
    plan = score_plan(moe, "price")
    path = written(exported("olmoe"), plan, price_per="sequence")
    assert verify_artifact(path, moe, plan, token_ids, dtype="float32").tokens == 108


def padded(rows: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows padded on the left, and their mask."""
    width = max(map(len, rows))
    ids = np.stack([np.pad(row, (width - len(row), 0)) for row in rows])
    mask = np.stack([np.arange(width) >= width - len(row) for row in rows]).astype(np.int64)
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_of_a_call_run_at_their_own_prices(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
    tmp_path: Path,
    family: str,
) -> None:
    plan = score_plan(moe_model(family), "price")
    assert plan.price is not None
    prices = [0.0, plan.price, 1e9]
    path = written(exported(family), plan, price_per="sequence")
    session = open_session(path, ep="cpu", count_activations=True)
    assert session.takes_prices
    (tmp_path / "scalar").mkdir()
    scalar = open_session(
        written(exported(family), plan, tmp_path / "scalar"), ep="cpu", count_activations=True
    )
    assert not scalar.takes_prices
    rows = [token_ids[0, :9], token_ids[1, :5], token_ids[2, :12]]
    ids, mask = padded(rows)
    first = session.run(ids, attention_mask=mask, price=prices)
    new = token_ids[3, :3, None]
    after = np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1)
    second = session.run(new, attention_mask=after, cache=first.cache, price=prices)
    totals = executed_by_token(second)
    assert totals[0] > totals[1] > totals[2]
    for place, (row, price) in enumerate(zip(rows, prices, strict=True)):
        alone = scalar.run(row[None], price=price)
        close(first.logits[place, -len(row) :], alone.logits[0])
        step = scalar.run(new[place : place + 1], cache=alone.cache, price=price)
        close(second.logits[place], step.logits[0])
        assert totals[place] == executed_by_token(step)[0]


def close(actual: NDArray[np.floating], expected: NDArray[np.floating]) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5)


def test_held_requests_get_the_tokens_that_they_get_alone(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
    tmp_path: Path,
) -> None:
    plan = score_plan(moe_model("olmoe"), "price")
    session = open_session(
        written(exported("olmoe"), plan, price_per="sequence"), ep="cpu", count_activations=True
    )
    held = held_budget(session)
    prompts = [token_ids[0], token_ids[1, :7], token_ids[2, :40], token_ids[3, :1]]

    def made(prompts: list[NDArray[np.int64]]) -> tuple[list[list[int]], list[tuple[int, int]]]:
        holds = [held.begin() for _ in prompts]
        tokens = generate(session, prompts, max_new_tokens=24, holds=holds, eos_ids=())
        return tokens, [(hold.tokens, hold.executed) for hold in holds]

    together = made(prompts)
    apart = [made([prompt]) for prompt in prompts]
    assert together[0] == [tokens for [tokens], _ in apart]
    assert together[1] == [run for _, [run] in apart]
    assert together[1][1][0] == 7 + 23  # all tokens but the last, none of the padding

    (tmp_path / "scalar").mkdir()
    scalar = open_session(
        written(exported("olmoe"), plan, tmp_path / "scalar"), ep="cpu", count_activations=True
    )
    outputs: list[Output] = []
    [alone] = generate(
        scalar,
        prompts[:1],
        max_new_tokens=24,
        holds=[held_budget(scalar).begin()],
        eos_ids=(),
        on_output=outputs.append,
    )
    assert alone == together[0][0]
    assert len(outputs) == 4 + 23
    with pytest.raises(GenerationError, match=r"4 sequences can't .* with --price-per sequence"):
        generate(scalar, prompts, max_new_tokens=2, holds=[held.begin() for _ in prompts])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_piece_that_ran_far_too_much_is_computed_again(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
    family: str,
) -> None:
    plan = score_plan(moe_model(family), "price")
    path = written(exported(family), plan)
    session = open_session(path, ep="cpu", count_activations=True)
    held = held_budget(session)
    before, ids = token_ids[:1, :8], token_ids[:1, 8:32]

    def at(price: float) -> Output:
        cache = session.run(before, price=held.begin().price).cache
        return session.run(ids, cache=cache, price=price)

    hold = held.begin()
    hold.price *= 0.5
    too_many = executed_by_token(at(hold.price)).sum()
    better = hold.corrected(24, int(too_many))
    assert better is not None
    cache = session.empty_cache(1, capacity=64)
    cache = session.run(before, price=held.begin().price, cache=cache).cache
    output = run_held(session, hold, ids, cache=cache)
    ran = executed_by_token(output).sum()
    assert (output.cache.length, hold.tokens, hold.executed) == (32, 24, ran)
    if family == "qwen3_next":  # its states can't go back
        assert ran == too_many
        return
    assert ran < too_many
    again = at(better)
    close(output.logits, again.logits)
    assert ran == executed_by_token(again).sum()
