"""What a call must not be given is said, and never computed with."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from alloc_moe.runtime.artifact.dial import price_of
from alloc_moe.runtime.artifact.plan import AllocationPlan, Budget
from alloc_moe.runtime.errors import ArtifactError, GenerationError
from alloc_moe.runtime.execution.session import ArtifactSession, open_session
from alloc_moe.runtime.text.generation import generate
from alloc_moe.runtime.text.model import load
from alloc_moe.runtime.text.sampling import Sampling

IDS = np.random.default_rng(3).integers(0, 257, (2, 6))


@pytest.fixture(scope="module", params=["copied", "shared"])
def session(request: pytest.FixtureRequest, toy: Path, shared_toy: Path) -> ArtifactSession:
    path = {"copied": toy, "shared": shared_toy}[request.param]
    return open_session(path, ep="cpu", threads=1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((0, 3), np.int64), r"shape \[0, 3\]"),
        (np.zeros((3, 0), np.int64), r"shape \[3, 0\]"),
        (np.zeros(3, np.int64), r"shape \[3\]"),
        ([[]], r"shape \[1, 0\]"),
        ([[1, 2], [3]], "can't be made an array"),
        ([[1.0, 2.0]], "type float64"),
        ([[True]], "type bool"),
        ([["1"]], "Give whole numbers"),
        ([[10**30]], "Give whole numbers"),
        ([[1, -1]], "id -1 is none of the model's, which are from 0 to 256"),
        ([[1, 257]], "id 257 is none"),
        ([[np.nan]], "type float64"),
    ],
)
def test_ids_that_are_none_are_rejected(
    session: ArtifactSession, ids: object, message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        session.run(ids)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((2, 5), int), r"shape \[2, 5\], where \[2, 6\]"),
        (np.ones((2, 7), int), r"shape \[2, 7\]"),
        (np.ones((1, 6), int), r"shape \[1, 6\]"),
        (np.ones(6, int), r"shape \[6\]"),
        (np.full((2, 6), 2), "other values than 0 and 1"),
        (np.full((2, 6), -1), "other values than 0 and 1"),
        (np.full((2, 6), 0.5), "other values than 0 and 1"),
        (np.full((2, 6), np.nan), "other values than 0 and 1"),
        (np.zeros((2, 6), int), "only zeros"),
        ([[1, 1], [1]], "can't be made an array"),
    ],
)
def test_masks_that_are_none_are_rejected(
    session: ArtifactSession, mask: np.ndarray, message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        session.run(IDS, attention_mask=mask)


def test_a_mask_that_changes_what_was_said_is_rejected(session: ArtifactSession) -> None:
    mask = np.ones((2, 6), int)
    mask[0, :2] = 0
    cache = session.run(IDS[:, :4], attention_mask=mask[:, :4]).cache
    with pytest.raises(GenerationError, match="says other than before"):
        session.run(IDS[:, 4:5], attention_mask=np.ones((2, 5), int), cache=cache)
    session.run(IDS[:, 4:5], attention_mask=mask[:, :5], cache=cache)
    assert cache.length == 5


@pytest.mark.parametrize("kind", [bool, np.int8, np.float32])
def test_masks_of_any_type_are_taken_and_holes_are_padding(
    session: ArtifactSession, kind: type
) -> None:
    expected = session.run(IDS[:1, [0, 1, 3, 5]]).logits
    mask = np.array([[1, 1, 0, 1, 0, 1]], kind)
    found = session.run(IDS[:1], attention_mask=mask).logits
    np.testing.assert_allclose(found[mask > 0], expected[0], atol=2e-4)


def test_a_cache_of_another_batch_or_session_is_rejected(
    session: ArtifactSession, toy: Path
) -> None:
    cache = session.run(IDS).cache
    with pytest.raises(GenerationError, match="batch of 2, the call has 1"):
        session.run(IDS[:1], cache=cache)
    other = open_session(toy, ep="cpu", threads=1)
    caches: list[Any] = [cache, {}, "cache"]
    for given in caches:
        with pytest.raises(GenerationError, match="made by another session"):
            other.run(IDS[:, :1], cache=given)
    session.run(IDS[:, :1], cache=cache.fork())


@pytest.mark.parametrize(
    ("batch", "capacity"),
    [
        *((0, 0), (-1, 0), (1, -1), (1.5, 0), (True, 0), ("1", 0), (10**12, 0), (None, 0)),
        *((1, 1.5), (1, np.nan), (1, "8"), (1, 2**70)),
    ],
)
def test_a_cache_for_nothing_is_rejected(
    session: ArtifactSession, batch: Any, capacity: Any
) -> None:
    with pytest.raises(GenerationError, match="can't be made"):
        session.empty_cache(batch, capacity=capacity)


def test_no_call_goes_past_the_context(bundle: Path) -> None:
    session = open_session(bundle, ep="cpu", threads=1)
    ids = np.zeros((1, 65), np.int64)
    with pytest.raises(GenerationError, match="to 65 tokens; the model's context holds 64"):
        session.run(ids)
    cache = session.run(ids[:, :64]).cache
    with pytest.raises(GenerationError, match="to 65 tokens"):
        session.run(ids[:, :1], cache=cache)
    mask = np.ones((1, 65), int)
    mask[0, :3] = 0  # padding takes no place in the context
    session.run(ids, attention_mask=mask)


@pytest.mark.parametrize("keep", [0, -1, 1.5, np.nan, "1", True, np.array([1, 2]), 2**70])
def test_no_logits_are_rejected(session: ArtifactSession, keep: Any) -> None:
    with pytest.raises(GenerationError, match=r"logits can't be kept\. Give 1 or more"):
        session.run(IDS, logits_to_keep=keep)


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_prices_that_are_none_are_rejected(dial_bundle: Path, price: float) -> None:
    session = open_session(dial_bundle, ep="cpu", threads=1)
    with pytest.raises(GenerationError, match="price of an activation is"):
        session.run(IDS, price=price)


@pytest.mark.parametrize(
    "budget",
    [np.float64(0.5), np.float32(0.5), np.array(0.5), np.int64(4), np.uint8(4), np.array(4), "4"],
)
def test_budgets_are_taken_from_numpy(dial_plan: AllocationPlan, budget: object) -> None:
    assert price_of(dial_plan, budget) == price_of(dial_plan, 0.5)  # type: ignore[arg-type]


def test_a_fraction_in_32_bits_is_what_it_says(dial_plan: AllocationPlan) -> None:
    plan = dataclasses.replace(dial_plan, budget=Budget(0.5, 4, 10))
    for fraction in ("0.7", "0.6", "0.3", "0.9"):
        assert price_of(plan, np.float32(fraction)) == price_of(plan, fraction)


@pytest.mark.parametrize(
    "budget", [True, np.bool_(1), np.nan, np.float32("inf"), np.array([0.5]), None, 1j, b"0.5"]
)
def test_budgets_that_are_none_are_rejected(dial_plan: AllocationPlan, budget: object) -> None:
    with pytest.raises(GenerationError, match="no positive number"):
        price_of(dial_plan, budget)  # type: ignore[arg-type]


def test_prompts_are_taken_from_numpy(bundle: Path) -> None:
    model = load(bundle, ep="cpu", threads=1)
    expected = generate(model.session, [[65, 66], [67, 68]], max_new_tokens=np.int64(3))
    for prompts in (np.array([[65, 66], [67, 68]]), [np.array([65, 66]), np.uint8([67, 68])]):
        assert generate(model.session, prompts, max_new_tokens=3) == expected
    texts = np.array(["AB", "CD"])
    assert [list(c.ids) for c in model.generate(texts, max_new_tokens=3)] == expected
    assert json.dumps([completion.prompt for completion in model.generate(texts, max_new_tokens=1)])
    assert model.generate([]) == []
    with pytest.raises(GenerationError, match=r"2\.5 new tokens"):
        model.generate(["a"], max_new_tokens=2.5)  # type: ignore[arg-type]
    assert generate(model.session, np.zeros((0, 2), int), max_new_tokens=1) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("AB", "one text"),
        ([["A"]], "Give whole numbers"),
        ([[1.5]], "type float64"),
        ([[[1]]], r"shape \[1, 1\]"),
        ([[]], "no tokens"),
        ([[999]], "outside 0 to 256"),
    ],
)
def test_prompts_that_are_none_are_rejected(
    session: ArtifactSession, prompts: object, message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        generate(session, prompts, max_new_tokens=1)  # type: ignore[arg-type]


def test_texts_that_are_none_are_rejected(bundle: Path) -> None:
    model = load(bundle, ep="cpu", threads=1)
    for prompts, message in (("A", "one text"), ([1], "of type int"), (["\udce9"], "UTF-8")):
        with pytest.raises(GenerationError, match=message):
            model.generate(prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 1.5, float("nan")])
def test_seeds_that_are_none_are_rejected(seed: float) -> None:
    with pytest.raises(GenerationError, match="seed"):
        Sampling(seed=seed)  # type: ignore[arg-type]


def test_what_onnxruntime_cannot_run_is_one_sentence(
    bundle: Path,
    tmp_path: Path,
    make_toy: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = make_toy(tmp_path / "out.onnx")
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.output[0] == "hidden0":
            node.op_type = "MatMul"
    for value in list(model.graph.value_info):
        model.graph.value_info.remove(value)
    path.write_bytes(model.SerializeToString())
    shutil.copy(bundle / "tokenizer.json", tmp_path)
    session = open_session(path, ep="cpu", threads=1)
    with pytest.raises(ArtifactError, match=r"can't run .*out\.onnx: .*MatMul") as caught:
        session.run(np.array([[1, 2, 3]]))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("threads", [0, -1, 257, 2000, 10**12])
def test_absurd_numbers_of_threads_are_rejected(toy: Path, threads: int) -> None:
    for given in ({"threads": threads}, {"more_options": {"intra_op_num_threads": str(threads)}}):
        if threads > 0 or "threads" in given:
            with pytest.raises(GenerationError, match=f"{threads} threads can't|takes a whole"):
                open_session(toy, ep="cpu", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", ["temperature", "top_p"])
@pytest.mark.parametrize("value", ["1", None, True, np.array([0.5, 0.5]), 1j, np.nan])
def test_settings_of_sampling_are_numbers(setting: str, value: Any) -> None:
    with pytest.raises(GenerationError, match=r"(temperature|top-p) is"):
        Sampling(**{"temperature": 1.0, setting: value})


def test_what_numpy_has_for_numbers_is_taken(session: ArtifactSession) -> None:
    Sampling(temperature=np.float32(0.5), top_p=np.array(0.5), seed=np.int64(3))  # type: ignore[arg-type]
    cache = session.empty_cache(np.int64(2), capacity=np.int8(8))  # type: ignore[arg-type]
    output = session.run(IDS, cache=cache, logits_to_keep=np.uint8(2))  # type: ignore[arg-type]
    np.testing.assert_array_equal(output.logits, session.run(IDS).logits[:, -2:])
    most: Any = np.int8(100)
    assert len(generate(session, [list(range(1, 29))], max_new_tokens=most, eos_ids=())[0]) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ep": "tpu"}, "The provider is 'tpu'"),
        ({"threads": "1"}, "1 threads can't run"),
        ({"threads": 1.5}, r"1\.5 threads can't run"),
        ({"more_options": {"session.intra_op.allow_spinning": 0}}, "Give a text, such as '0'"),
    ],
)
def test_sessions_of_other_kinds_are_rejected(
    toy: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        open_session(toy, **{"ep": "cpu", **options})
