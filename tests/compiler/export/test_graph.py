"""Exported graphs: what they are made of, and that every lowering computes what PyTorch does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from alloc_moe.compiler.errors import VerificationError
from alloc_moe.compiler.export import graph as export
from alloc_moe.compiler.export.normalize import export_model
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.architectures import kinds_with_states
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.rounding.cache_scales import measure_cache_scales
from alloc_moe.compiler.verify.parity import Verification, verify_artifact
from alloc_moe.passes.attention.group_query import group_attention
from alloc_moe.passes.base import routed_experts
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.text.generation import generate

Models = Callable[[str], MoeModel]
Graphs = Callable[[str], ir.Model]


def uneven(moe: MoeModel) -> list[int]:
    """Return a k for each MoE layer: not all of its experts, nor the same in all."""
    ks = (layer.experts_per_token for layer in moe.layers)
    return [1 + (index + 1) % k for index, k in enumerate(ks)]


def dims(value: ir.Value) -> list[int | str | None]:
    found = [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
    recurrent = str(value.name).endswith(".recurrent_state")
    return [found[0], *whatever_order(found[1:])] if recurrent else found


def whatever_order(sizes: Sequence[int | str | None]) -> list[int | str | None]:
    """Return sizes sorted, without ones: each family has its own order in PyTorch."""
    return sorted((size for size in sizes if size != 1), key=str)


def cached(layer: Any) -> dict[str, tuple[list[int], int | None]]:
    """Return the shapes of what a layer of PyTorch's cache holds, and the axis that grows."""
    if not hasattr(layer, "conv_states"):
        if layer.keys is None:  # of a layer that doesn't attend
            return {}
        return {kind: (list(getattr(layer, f"{kind}s").shape), 2) for kind in ("key", "value")}
    batch, channels, taps = layer.conv_states[0].shape
    found: dict[str, tuple[list[int], int | None]] = {
        "conv_state": ([batch, channels, taps - 1], None)
    }
    if layer.recurrent_states[0] is not None:
        found["recurrent_state"] = (
            [batch, *whatever_order(layer.recurrent_states[0].shape[1:])],  # type: ignore[list-item]
            None,
        )
    return found


def greedy_choices(
    moe: MoeModel, prompts: NDArray[np.int64], mask: NDArray[np.int64], made: list[list[int]]
) -> list[list[int]]:
    """Return what PyTorch would say in place of each token made, in one pass over all of them."""
    real = torch.from_numpy(np.concatenate([mask, np.ones_like(made)], axis=1))
    with torch.inference_mode():
        logits = moe.model(
            input_ids=torch.from_numpy(np.concatenate([prompts, made], axis=1)),
            attention_mask=real,
            position_ids=(real.cumsum(1) - 1).clamp(min=0),
        ).logits
    choices: list[list[int]] = logits[:, prompts.shape[1] - 1 : -1].argmax(-1).tolist()
    return choices


def weights(graph: ir.Model) -> dict[str, ir.TensorProtocol]:
    found = {name: value.const_value for name, value in graph.graph.initializers.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def verified(
    graph: ir.Model,
    moe: MoeModel,
    plan: AllocationPlan,
    tokens: NDArray[np.int64],
    folder: Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> Verification:
    """Compile `plan` into `graph`, write it, and compare it with PyTorch."""
    path = folder / f"{device}.onnx"
    package.save_graph(specialize(graph, plan, device=device), path)
    return verify_artifact(path, moe, plan, tokens, dtype=dtype)


def test_inputs_and_outputs_are_those_of_text_generation(
    exported: Graphs, moe_model: Models, compiled_family: str
) -> None:
    graph, moe = exported(compiled_family).graph, moe_model(compiled_family)
    expected: dict[str, list[int | str | None]] = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
    }
    present: dict[str, list[int | str | None]] = {"logits": ["batch_size", "sequence_length", 288]}
    with torch.inference_mode():
        cache = moe.model(input_ids=torch.ones(1, 2, dtype=torch.int64)).past_key_values
    for index, layer in enumerate(cache.layers):
        for kind, (shape, axis) in cached(layer).items():
            for names, side, grown in (
                (expected, "past_key_values", "past_sequence_length"),
                (present, "present", "total_sequence_length"),
            ):
                sizes: list[int | str | None] = ["batch_size", *shape[1:]]
                if axis is not None:
                    sizes[axis] = grown
                names[f"{side}.{index}.{kind}"] = sizes
    assert {str(value.name): dims(value) for value in graph.inputs} == expected
    assert {str(value.name): dims(value) for value in graph.outputs} == present


def test_each_moe_layer_is_one_operator(
    exported: Graphs, moe_model: Models, compiled_family: str
) -> None:
    nodes = list(routed_experts(exported(compiled_family)))
    assert [node.attributes["layer"].as_int() for node in nodes] == list(
        range(len(moe_model(compiled_family).layers))
    )


def test_no_weight_of_any_size_is_in_memory(exported: Graphs, family: str) -> None:
    found = weights(exported(family))
    large = {name for name, tensor in found.items() if tensor.size > export._SMALL}
    lazy = {name for name, tensor in found.items() if isinstance(tensor, ir.LazyTensor)}
    assert large
    assert large <= lazy
    assert all(len(found[name].shape) > 1 for name in lazy - large)  # small matrices
    assert not any(found[name].cache for name in lazy)  # type: ignore[attr-defined]


def test_every_weight_is_used(exported: Graphs, family: str) -> None:
    unused = [n for n, value in exported(family).graph.initializers.items() if not value.uses()]
    assert unused == []


@pytest.mark.parametrize("operator", ["Attention", "RotaryEmbedding", "RMSNormalization"])
def test_fused_operators_stay_whole(exported: Graphs, operator: str) -> None:
    found = [node.op_type for node in exported("olmoe").graph].count(operator)
    # Per layer: attention; queries and keys rotated; both normalised, and two norms around.
    assert found == {"Attention": 3, "RotaryEmbedding": 6, "RMSNormalization": 3 * 4 + 1}[operator]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("redistribution", ["none", "batch", "sequence"])
def test_every_lowering_computes_what_pytorch_does(
    exported: Graphs,
    moe_model: Models,
    plan_for: Callable[..., AllocationPlan],
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    compiled_family: str,
    redistribution: str,
    device: str,
) -> None:
    moe = moe_model(compiled_family)
    if device == "cuda" and kinds_with_states(moe.config):
        pytest.skip("states have no operators on CUDA")
    # Renormalised weights with one redistribution: the two don't meet in the code.
    mode = "renorm" if redistribution == "sequence" else "keep"
    plan = plan_for(moe, uneven(moe), redistribution=redistribution, weights=mode)
    result = verified(exported(compiled_family), moe, plan, token_ids, tmp_path, device=device)
    assert result.max_abs_logit_error < 1e-4
    assert result.kl < 1e-8
    assert result.tokens == 23 + 14 + 5 + 3 * 4


def test_the_full_budget_is_the_original_model(
    exported: Graphs,
    moe_model: Models,
    plan_for: Callable[..., AllocationPlan],
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    family: str,
) -> None:
    moe = moe_model(family)
    plan = plan_for(moe, [layer.experts_per_token for layer in moe.layers])
    result = verified(exported(family), moe, plan, token_ids, tmp_path)
    assert result.max_abs_logit_error < 1e-4


def test_greedy_tokens_equal_those_of_transformers(
    exported: Graphs,
    moe_model: Models,
    plan_for: Callable[..., AllocationPlan],
    written: Callable[..., Path],
    token_ids: NDArray[np.int64],
    compiled_family: str,
) -> None:
    """Of a left-padded batch, and beyond every window that a family has."""
    moe, new = moe_model(compiled_family), 64
    plan = plan_for(moe, [layer.experts_per_token for layer in moe.layers])
    session = open_session(written(exported(compiled_family), plan), ep="cpu")
    prompts = [token_ids[0, :23], token_ids[1, :14], token_ids[2, :5]]
    made = generate(session, prompts, max_new_tokens=new, eos_ids=frozenset())
    padded = np.stack([np.pad(ids, (23 - len(ids), 0)) for ids in prompts])
    mask = np.stack([np.arange(23) >= 23 - len(ids) for ids in prompts]).astype(np.int64)
    with torch.inference_mode():
        expected = moe.model.generate(
            torch.from_numpy(padded),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
        )
    for text, other, chosen in zip(
        made, expected[:, 23:].tolist(), greedy_choices(moe, padded, mask, made), strict=True
    ):
        # Near a tie of a router PyTorch's own text, made step by step, parts from its whole pass.
        assert text in (other, chosen)


def test_windows_and_sinks_go_with_an_int8_cache(
    exported: Graphs,
    moe_model: Models,
    plan_for: Callable[..., AllocationPlan],
    written: Callable[..., Path],
    token_ids: NDArray[np.int64],
) -> None:
    moe, graph = moe_model("gpt_oss"), exported("gpt_oss")
    plan, scales = plan_for(moe, uneven(moe)), measure_cache_scales(moe, token_ids)
    assert {step.shape for pair in scales.values() for step in pair} == {(2, 16)}
    path = written(graph, plan, cache_scales=scales)
    result = verify_artifact(path, moe, plan, token_ids, dtype="float32", cache_scales=scales)
    assert result.max_abs_logit_error < 1e-2


@pytest.mark.parametrize("change", ["local_window_size", "head_sink"])
def test_another_window_or_sink_is_found_out(
    exported: Graphs,
    moe_model: Models,
    plan_for: Callable[..., AllocationPlan],
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    change: str,
) -> None:
    moe = moe_model("gpt_oss")
    plan = plan_for(moe, uneven(moe))
    graph = specialize(exported("gpt_oss"), plan, device="cpu")
    node = next(group_attention(graph))
    if change == "head_sink":
        node.replace_input_with(11, None)
    else:
        assert node.attributes[change].as_int() == moe.config.sliding_window
        node.attributes[change] = ir.AttrInt64(change, moe.config.sliding_window + 1)
    package.save_graph(graph, tmp_path / "out.onnx")
    with pytest.raises(VerificationError, match="logits differ from PyTorch's by up to"):
        verify_artifact(tmp_path / "out.onnx", moe, plan, token_ids, dtype="float32")


@pytest.mark.parametrize(
    ("family", "changes", "dtype", "expected"),
    [
        ("olmoe", {}, "float16", ir.DataType.FLOAT16),  # others need this graph too
        ("mixtral", {"num_hidden_layers": 1}, "bfloat16", ir.DataType.BFLOAT16),
    ],
    ids=["float16", "bfloat16"],
)
def test_half_precision_graphs_have_the_type_asked_for(
    checkpoint: Callable[..., Path],
    plan_for: Callable[..., AllocationPlan],
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    family: str,
    changes: dict[str, int],
    dtype: Any,
    expected: ir.DataType,
) -> None:
    moe = load_model(str(checkpoint(family, **changes)))
    graph = export_model(moe, dtype=dtype)
    types = {str(value.name): value.dtype for value in (*graph.graph.inputs, *graph.graph.outputs)}
    cache = {name: found for name, found in types.items() if "present" in name or "past" in name}
    assert set(cache.values()) == {expected}
    assert types["logits"] == expected
    large = [tensor for tensor in weights(graph).values() if tensor.size > export._SMALL]
    assert {tensor.dtype for tensor in large} == {expected}
    if dtype == "float16":  # which onnxruntime's CPU provider computes by way of float32
        for device in ("cpu", "cuda"):
            plan = plan_for(moe, uneven(moe))
            result = verified(graph, moe, plan, token_ids, tmp_path, device=device, dtype=dtype)
            assert 0 < result.kl < 1e-4
