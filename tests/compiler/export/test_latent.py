"""Latent attention: exported in plain words, compiled to one cache that is appended to in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek

from alloc_moe.compiler.export.latent import plain_latent_attention, rotate_pairs
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.architectures import latent_attention
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.passes.attention.expand_latents import ExpandLatentsPass
from alloc_moe.passes.experts.lower import Allocation, LowerExpertsPass
from alloc_moe.runtime.artifact.plan import LATENT_CACHE_KEY, SHARED_CACHE_KEY, AllocationPlan
from alloc_moe.runtime.execution.session import ArtifactSession, open_session

Models = Callable[[str], MoeModel]


@pytest.fixture
def plan(moe_model: Models, plan_for: Callable[..., AllocationPlan]) -> AllocationPlan:
    return plan_for(moe_model("deepseek_v2"), [2, 2], redistribution="none")


@pytest.fixture
def session(
    exported: Callable[[str], ir.Model], plan: AllocationPlan, written: Callable[..., Path]
) -> ArtifactSession:
    return open_session(written(exported("deepseek_v2"), plan), ep="cpu")


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_keys_and_values_are_those_of_the_layer(moe_model: Models, family: str) -> None:
    model = moe_model(family).model
    layers = latent_attention(model)
    assert len(layers) == model.config.num_hidden_layers
    layer = next(iter(layers.values()))
    latents, turned = torch.randn(2, 1, 5, 32), torch.randn(2, 1, 5, 16)
    with torch.inference_mode():
        expected = layer.expand_kv(latents, turned)
        with plain_latent_attention(model):
            found = layer.expand_kv(latents, turned)
    for new, old in zip(found, expected, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_complex_rotations_have_the_same_products() -> None:
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8)
    angles = torch.polar(torch.full((2, 5, 4), 1.2), torch.randn(2, 5, 4))
    products = []
    for rotate in (deepseek.apply_rotary_emb, rotate_pairs):
        turned, keys = rotate(query, key, angles)
        products.append(turned @ keys.transpose(2, 3))
    torch.testing.assert_close(products[1], products[0], rtol=1e-5, atol=1e-5)


def test_what_transformers_does_is_back_after_the_export(moe_model: Models) -> None:
    model, before = moe_model("deepseek_v2").model, deepseek.apply_rotary_emb
    layer = next(iter(latent_attention(model).values()))
    with plain_latent_attention(model):
        assert deepseek.apply_rotary_emb is rotate_pairs
    assert deepseek.apply_rotary_emb is before
    assert "expand_kv" not in vars(layer)


def test_the_artifact_says_what_its_cache_is(session: ArtifactSession) -> None:
    metadata = session.files.onnx.metadata
    assert metadata[SHARED_CACHE_KEY] == metadata[LATENT_CACHE_KEY] == "float32"
    rows, columns = (slot.empty_shape for slot in session.slots[:2])
    assert (rows, columns) == ((1, 1, 0, 32 + 16), (1, 1, 32, 0))
    assert len(session.slots) == 2 * 3
    assert all(slot.latent for slot in session.slots)


def test_other_families_have_no_latent_cache(
    exported: Callable[[str], ir.Model],
    moe_model: Models,
    plan_for: Callable[..., AllocationPlan],
) -> None:
    plan = plan_for(moe_model("olmoe"), [2, 2, 2])
    assert LATENT_CACHE_KEY not in specialize(exported("olmoe"), plan, device="cpu").metadata_props


def test_a_layer_whose_router_chooses_groups_is_60_nodes(
    exported: Callable[[str], ir.Model], plan: AllocationPlan
) -> None:
    model = specialize(exported("deepseek_v2"), plan, device="cpu")
    appends = [at for at, node in enumerate(model.graph) if node.op_type == "ScatterND"]
    assert len(appends) == 3
    found = Counter(node.op_type for node in model.graph)
    # The first MoE layer asks for what all share: which tokens are real, and a shape.
    assert (found["real_tokens"], appends[2] - appends[1]) == (1, 60 + 2)
    made = {id(node.outputs[0]) for node in model.graph if node.op_type == "Concat"}
    shapes = [id(node.inputs[1]) for node in model.graph if node.op_type == "Reshape"]
    uses = Counter(shape for shape in shapes if shape in made)
    assert sorted(uses.values()) == [2, 3, 3, 3]  # one of both MoE layers, others of all three
    assert (found["RotaryEmbedding"], found["Attention"], found["OneHot"]) == (6, 0, 2)


def test_room_makes_no_difference(session: ArtifactSession, token_ids: NDArray[np.int64]) -> None:
    for rows in (1, 3):
        ids = token_ids[:rows, :12]
        tight, wide = session.empty_cache(rows), session.empty_cache(rows, capacity=40)
        for part in (ids[:, :7], ids[:, 7:8], ids[:, 8:]):
            logits = [session.run(part, cache=cache).logits for cache in (tight, wide)]
            np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5, atol=1e-6)


def test_several_sequences_go_on_by_several_tokens_in_one_call(
    session: ArtifactSession, token_ids: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    def apart(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(session, "_run_rows", apart)
    whole = session.run(token_ids[:3, :12]).logits
    cache = session.empty_cache(3)
    session.run(token_ids[:3, :5], cache=cache)
    np.testing.assert_allclose(
        session.run(token_ids[:3, 5:12], cache=cache).logits, whole[:, 5:], rtol=1e-5, atol=2e-6
    )


def test_a_forked_and_a_shortened_cache_go_on_as_they_should(
    session: ArtifactSession, token_ids: NDArray[np.int64]
) -> None:
    cache = session.empty_cache(1, capacity=20)
    session.run(token_ids[:1, :8], cache=cache)
    fork = cache.fork()
    first = session.run(token_ids[:1, 8:10], cache=cache).logits
    cache.truncate(8)
    for other in (fork, cache):
        again = session.run(token_ids[:1, 8:10], cache=other).logits
        np.testing.assert_allclose(again, first, rtol=1e-5, atol=1e-6)


def _logits(model: ir.Model, ids: NDArray[np.int64]) -> list[NDArray[np.float32]]:
    """Return logits of a left-padded prompt of seven, and of what follows it at once."""
    content = ir.to_proto(model).SerializeToString()
    running = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    past = {
        value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
        for value in running.get_inputs()
        if value.name.startswith("past_")
    }
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    names, found = [value.name for value in running.get_outputs()], []
    for begin, end in ((0, 7), (7, ids.shape[1])):
        positions = np.maximum(mask[:, :end].cumsum(1) - 1, 0)[:, begin:]
        given = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
        made = running.run(None, {**given, "position_ids": positions, **past})
        outputs = dict(zip(names, made, strict=True))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        found.append(outputs["logits"] * mask[:, begin:end, None])
    return found


@pytest.fixture
def lowered(exported: Callable[[str], ir.Model], plan: AllocationPlan) -> ir.Model:
    """Return a graph that onnxruntime runs, whose attention is as it was exported."""
    model = exported("deepseek_v2").clone()
    LowerExpertsPass(Allocation([2, 2], "none"), pairs=False)(model)
    return model


def test_expanded_latents_give_the_same_logits(
    lowered: ir.Model, token_ids: NDArray[np.int64]
) -> None:
    expected = _logits(lowered, token_ids[:2, :12])
    assert ExpandLatentsPass()(lowered).modified
    ExpandLatentsPass().ensures(lowered)
    shapes = [value.shape for value in lowered.graph.inputs if "past" in (value.name or "")]
    assert {tuple(shape[at] for at in (1, 3)) for shape in shapes if shape} == {(4, 32)}
    for one, other in zip(expected, _logits(lowered, token_ids[:2, :12]), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6 * np.abs(one).max())


def test_expanding_a_second_time_changes_nothing(lowered: ir.Model) -> None:
    with pytest.raises(ir.passes.PostconditionError, match="could be expanded"):
        ExpandLatentsPass().ensures(lowered)
    ExpandLatentsPass()(lowered)
    assert not ExpandLatentsPass()(lowered).modified


def test_queries_of_another_product_leave_latents_as_they_are(lowered: ir.Model) -> None:
    weight = lowered.graph.initializers["model.layers.1.self_attn.q_proj.weight"]
    (transpose,) = weight.consumers()
    transpose.op_type = "Identity"  # as far as the pass knows, no weight [out, in]
    assert not ExpandLatentsPass()(lowered).modified
