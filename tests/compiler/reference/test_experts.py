from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import Redistribution
from alloc_moe.compiler.reference.experts import (
    Activations,
    allocated,
    library_experts,
    replaced_experts,
    run_pairs,
)
from alloc_moe.compiler.reference.policies import LayerParameters

Models = Callable[[str], MoeModel]

REDISTRIBUTIONS: list[Redistribution] = ["none", "batch", "sequence"]


def routing(
    batch: int, length: int, candidates: int, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch * length, 2 * candidates, generator=generator).softmax(-1)
    weights, ids = scores.topk(candidates)
    return weights, ids


def left_padded(batch: int, length: int) -> torch.Tensor:
    pads = torch.arange(batch)[:, None] * 2 % length
    return torch.arange(length)[None] >= pads


def given(*ks: float) -> list[LayerParameters]:
    return [LayerParameters(k) for k in ks]


def test_pairs_equal_the_modules_own_eager_forward(moe_model: Models, any_family: str) -> None:
    moe = moe_model(any_family)
    layer = moe.layers[0]
    experts: Any = moe.model.get_submodule(layer.experts_name)
    hidden = torch.randn(9, experts.down_proj.shape[2 if experts.is_transposed else 1])
    ids = torch.tensor([0, 0, 3, 3, 3, 1, 0, 3, 1])  # most experts get no row
    weights = torch.rand(9)
    eager = type(experts).forward.__wrapped__  # type: ignore[attr-defined]
    with torch.inference_mode():
        expected = eager(experts, hidden, ids[:, None], weights[:, None])
        torch.testing.assert_close(run_pairs(experts, hidden, ids, weights), expected)
        assert run_pairs(experts, hidden[:0], ids[:0], weights[:0]).shape == (0, hidden.shape[1])


def test_many_pairs_are_evaluated_in_parts(
    moe_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = moe_model("olmoe")
    experts = moe.model.get_submodule(moe.layers[0].experts_name)
    weights, ids = routing(1, 50, 4)
    hidden = torch.randn(50, moe.config.hidden_size)
    with torch.inference_mode():
        whole = library_experts(experts, hidden, ids, weights)
        monkeypatch.setattr("alloc_moe.compiler.reference.experts._PAIRS", 28)
        torch.testing.assert_close(library_experts(experts, hidden, ids, weights), whole)


def token_ids(moe: MoeModel, batch: int = 3, length: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(moe.config.vocab_size, (batch, length), generator=generator)


def run(
    moe: MoeModel,
    ks: list[int],
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    redistribution: Redistribution = "none",
    weights: str = "keep",
) -> tuple[torch.Tensor, Activations]:
    with (
        torch.inference_mode(),
        allocated(
            moe.model,
            moe.layers,
            given(*ks),
            redistribution=redistribution,
            weights=weights,  # type: ignore[arg-type]
        ) as activations,
    ):
        return moe.model(input_ids=ids, attention_mask=mask).logits, activations


@pytest.mark.parametrize("redistribution", REDISTRIBUTIONS)
def test_all_experts_reproduce_the_model(
    moe_model: Models, family: str, redistribution: Redistribution
) -> None:
    moe = moe_model(family)
    ids = token_ids(moe)
    real = left_padded(3, 16)
    with torch.inference_mode():
        expected = moe.model(input_ids=ids, attention_mask=real.long()).logits
    ks = [layer.experts_per_token for layer in moe.layers]
    for mode in ("keep", "renorm"):
        logits, activations = run(moe, ks, ids, real.long(), redistribution, mode)
        torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)
        assert activations.executed == [k * int(real.sum()) for k in ks]
        assert activations.margin == math.inf


def set_top_k(moe: MoeModel, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    for layer in moe.layers:
        monkeypatch.setattr(moe.model.get_submodule(f"{layer.name}.gate"), "top_k", k)


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("olmoe", "keep"),
        ("qwen2_moe", "keep"),
        ("deepseek_v2", "keep"),
        ("qwen3_moe", "renorm"),  # these renormalise in the router
        ("mixtral", "renorm"),
    ],
)
def test_fewer_experts_equal_a_router_that_picks_fewer(
    moe_model: Models, monkeypatch: pytest.MonkeyPatch, family: str, mode: str
) -> None:
    moe = moe_model(family)
    ids = token_ids(moe)
    for k in range(1, moe.layers[0].experts_per_token):
        logits, activations = run(moe, [k] * len(moe.layers), ids, weights=mode)
        set_top_k(moe, monkeypatch, k)
        with torch.inference_mode():
            expected = moe.model(input_ids=ids).logits
        monkeypatch.undo()
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert activations.per_token == [k] * len(moe.layers)


@pytest.mark.parametrize("redistribution", REDISTRIBUTIONS)
def test_executed_activations_equal_the_plan(
    moe_model: Models, family: str, redistribution: Redistribution
) -> None:
    moe = moe_model(family)
    ks = [1 + index % layer.experts_per_token for index, layer in enumerate(moe.layers)]
    real = left_padded(3, 16)
    logits, activations = run(moe, ks, token_ids(moe), real.long(), redistribution)
    assert activations.tokens == int(real.sum())
    assert activations.executed == [k * int(real.sum()) for k in ks]
    assert activations.per_token == ks
    assert 0 <= activations.margin < 1
    assert logits[real].isfinite().all()


def test_redistribution_and_renormalisation_change_the_output(moe_model: Models) -> None:
    moe = moe_model("olmoe")
    ids = token_ids(moe)
    plain, _ = run(moe, [2, 2, 2], ids)
    for redistribution, mode in (("batch", "keep"), ("sequence", "keep"), ("none", "renorm")):
        other, _ = run(moe, [2, 2, 2], ids, None, redistribution, mode)  # type: ignore[arg-type]
        assert (other - plain).abs().max() > 1e-3


def test_a_sequence_gives_the_same_alone_and_padded_in_a_batch(moe_model: Models) -> None:
    moe = moe_model("olmoe")
    ids, real = token_ids(moe), left_padded(3, 16)
    together, _ = run(moe, [2, 3, 1], ids, real.long(), "sequence")
    alone, _ = run(moe, [2, 3, 1], ids[2:, 4:], None, "sequence")
    torch.testing.assert_close(together[2:, 4:], alone, rtol=0, atol=1e-5)


def test_with_a_cache_the_last_columns_of_the_mask_are_the_current_tokens(
    moe_model: Models,
) -> None:
    moe = moe_model("qwen3_moe")
    ids, real = token_ids(moe), left_padded(3, 16)
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    with (
        torch.inference_mode(),
        allocated(
            moe.model, moe.layers, given(1, 2, 4), redistribution="sequence", weights="keep"
        ) as activations,
    ):
        first = moe.model(
            input_ids=ids[:, :10],
            attention_mask=real[:, :10].long(),
            position_ids=positions[:, :10],
            use_cache=True,
        )
        moe.model(
            input_ids=ids[:, 10:],
            attention_mask=real.long(),
            position_ids=positions[:, 10:],
            past_key_values=first.past_key_values,
            use_cache=True,
        )
    assert activations.tokens == int(real.sum())
    assert activations.per_token == [1, 2, 4]


def test_generation_runs_under_a_plan(moe_model: Models) -> None:
    moe = moe_model("olmoe")
    ids = token_ids(moe, batch=1, length=5)
    with allocated(
        moe.model, moe.layers, given(1, 2, 3), redistribution="batch", weights="keep"
    ) as activations:
        moe.model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert activations.tokens == 5 + 3
    assert activations.executed == [8, 16, 24]


def test_inputs_embeds_count_as_tokens(moe_model: Models) -> None:
    moe = moe_model("olmoe")
    with allocated(
        moe.model, moe.layers, given(1, 2, 3), redistribution="batch", weights="keep"
    ) as activations:
        moe.model(inputs_embeds=torch.randn(2, 4, moe.config.hidden_size))
    assert activations.executed == [8, 16, 24]


def test_everything_is_restored_after_an_error(moe_model: Models) -> None:
    moe = moe_model("olmoe")
    ids = token_ids(moe)
    before = moe.model.get_experts_implementation()
    expected = moe.model(input_ids=ids).logits
    with (
        pytest.raises(RuntimeError, match="stop"),
        allocated(moe.model, moe.layers, given(1, 1, 1), redistribution="none", weights="keep"),
    ):
        raise RuntimeError("stop")
    assert moe.model.get_experts_implementation() == before
    assert not moe.model._forward_pre_hooks
    assert torch.equal(moe.model(input_ids=ids).logits, expected)


def test_an_inner_block_gives_way_to_the_outer(moe_model: Models) -> None:
    moe = moe_model("olmoe")
    ids = token_ids(moe)
    name = moe.layers[0].experts_name
    with allocated(
        moe.model, moe.layers, given(1, 1, 1), redistribution="none", weights="keep"
    ) as activations:
        with replaced_experts(moe.model, {name: lambda experts, hidden, ids, weights: hidden}):
            moe.model(input_ids=ids)
        assert activations.executed == [0, 48, 48]
        moe.model(input_ids=ids)
        assert activations.executed == [48, 96, 96]


def test_wrong_use_is_reported(moe_model: Models) -> None:
    moe = moe_model("olmoe")
    with pytest.raises(ValueError, match=r"k is 5 in model\.layers\.1\.mlp, not in 1\.\.4"):
        run(moe, [1, 5, 1], token_ids(moe))
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, sequence\]"):
        run(moe, [1, 1, 1], token_ids(moe), torch.ones(3, 1, 16, 16))


def test_a_mean_that_is_not_whole_is_for_scores_only(moe_model: Models) -> None:
    moe = moe_model("olmoe")
    ids = token_ids(moe)
    with (
        pytest.raises(ValueError, match=r"k is 1\.5 in .*; 'batch' needs it whole"),
        allocated(moe.model, moe.layers, given(1.5, 2, 2), redistribution="batch", weights="keep"),
    ):
        moe.model(input_ids=ids)
    with (
        torch.inference_mode(),
        allocated(
            moe.model, moe.layers, given(1.5, 2, 2), redistribution="threshold", weights="keep"
        ) as activations,
    ):
        moe.model(input_ids=ids)
    assert activations.per_token == [4, 4, 4]  # the threshold is 0, which all reach
