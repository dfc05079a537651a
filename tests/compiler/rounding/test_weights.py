"""Which weights are stored in few bits, and models that compute with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from alloc_moe.compiler.commands.alloc_compile import compile_command
from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.model.checkpoint import open_checkpoint
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.rounding.formats import choose_formats
from alloc_moe.compiler.rounding.weights import float_weights, quantized
from alloc_moe.compiler.verify.exact import exact_copy
from alloc_moe.passes.blockwise import BlockFormat
from alloc_moe.runtime.execution.session import open_session

BLOCKS = {"mixtral": 64, "nemotron_h": 16}  # of experts' rows, where it isn't 32
TINY_MOE = Path(__file__).parents[3] / "examples" / "tiny-moe"


def test_routers_stay_floats(moe_model: Callable[[str], MoeModel], any_family: str) -> None:
    moe = moe_model(any_family)
    chosen = choose_formats(moe.checkpoint, "int4")
    assert not [name for name in chosen.weights if "gate.weight" in name]
    assert any(name.endswith(("o_proj.weight", "out_proj.weight")) for name in chosen.weights)
    assert chosen.experts == (BlockFormat(4, BLOCKS.get(any_family, 32)),) * len(moe.layers)


def test_embeddings_take_eight_bits_and_the_head_those_of_the_type(
    moe_model: Callable[[str], MoeModel],
) -> None:
    moe = moe_model("olmoe")
    weights = choose_formats(moe.checkpoint, "int4").weights
    assert weights["model.embed_tokens.weight"] == BlockFormat(8, 64)
    assert weights["lm_head.weight"] == BlockFormat(4, 64)


@pytest.mark.parametrize(("device", "rounded"), [("cpu", False), ("cuda", True)])
def test_what_makes_keys_of_latents_stays_floats_on_the_cpu(
    moe_model: Callable[[str], MoeModel], device: str, rounded: bool
) -> None:
    checkpoint = moe_model("deepseek_v2").checkpoint
    weights = choose_formats(checkpoint, "int4", device=device).weights
    assert any("kv_b_proj" in name for name in weights) == rounded
    assert any("kv_a_proj" in name for name in weights)


def test_wide_rows_have_fewer_scales_but_in_embeddings_and_head() -> None:
    chosen = choose_formats(open_checkpoint(str(TINY_MOE)), "int4")  # hidden size 128
    blocks = {name.split(".")[-2]: form.block for name, form in chosen.weights.items()}
    attention = dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj"], 128)
    assert blocks == attention | {"embed_tokens": 64, "lm_head": 64}
    assert {form.block for form in chosen.experts} == {64}  # their intermediate size


def test_a_tied_head_is_as_fine_as_the_embedding(moe_model: Callable[[str], MoeModel]) -> None:
    moe = moe_model("qwen2_moe")
    weights = choose_formats(moe.checkpoint, "int4").weights
    assert weights["model.embed_tokens.weight"] == weights["lm_head.weight"] == BlockFormat(8, 64)


def test_experts_that_blocks_do_not_divide_are_refused(
    moe_model: Callable[[str], MoeModel],
) -> None:
    moe = moe_model("olmoe")
    experts = moe.checkpoint.skeleton.get_submodule(moe.layers[0].experts_name)
    rows = experts.down_proj
    try:
        experts.down_proj = torch.nn.Parameter(torch.zeros(8, 64, 40), requires_grad=False)
        with pytest.raises(UnsupportedModelError, match="rows of 64 and 40, which blocks of 16"):
            choose_formats(moe.checkpoint, "int4")
    finally:
        experts.down_proj = rows


@pytest.fixture
def fresh(checkpoint: Callable[[str], Path]) -> MoeModel:
    """Return a model whose weights may be changed."""
    return load_model(str(checkpoint("olmoe")))


def test_weights_are_rounded_and_given_back(fresh: MoeModel) -> None:
    before = {name: value.clone() for name, value in fresh.model.named_parameters()}
    chosen = choose_formats(fresh.checkpoint, "int4")
    moe = quantized(fresh, chosen)

    def changed() -> set[str]:
        pairs = moe.model.named_parameters()
        return {name for name, value in pairs if not torch.equal(value, before[name])}

    experts = {f"{layer.experts_name}.{w}" for layer in moe.layers for w in _EXPERTS}
    assert changed() == set(chosen.weights) | experts
    with float_weights(moe):
        assert changed() == set()
    assert changed() == set(chosen.weights) | experts
    assert moe.fingerprint == f"{fresh.fingerprint}:int4/32/64"


_EXPERTS = ("gate_up_proj", "down_proj")


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v2"])
@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_a_compiled_artifact_computes_with_the_rounded_weights(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str, dtype: str
) -> None:
    output = tmp_path / "out.onnx"
    arguments = [str(checkpoint(family)), "--budget", "0.5", "-o", str(output), "--dtype", dtype]
    made = CliRunner().invoke(compile_command, [*arguments, "--tokens", "512", "--json", "-q"])
    assert made.exit_code == 0, made.output
    plan = json.loads(made.stdout)["plan"]
    assert plan["verify"]["max_abs_logit_error"] < 1e-3
    assert 0 < plan["verify"]["kl"] < (0.02 if dtype == "int8" else 0.5)
    assert plan["quantization"]["dtype"] == dtype
    assert plan["quantization"].get("rounding") == ("gptq" if dtype == "int4" else None)
    assert set(plan["quantization"]["expert_bits"]) == {4 if dtype == "int4" else 8}
    model = ir.load(output)
    operators = {node.op_type for node in model.graph}
    assert {"QMoE", "MatMulNBits", "GatherBlockQuantized"} <= operators
    assert "MoE" not in operators
    largest = max(np.prod(v.shape.numpy()) for v in _floats(model) if v.shape is not None)
    assert largest < 288 * 64  # neither the head nor the embedding is left as floats


def _floats(model: ir.Model) -> list[ir.Value]:
    return [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]


def test_an_exact_copy_shares_the_data_and_leaves_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.onnx"
    arguments = [str(checkpoint("olmoe")), "--budget", "1.0", "-o", str(output), "--dtype", "int4"]
    made = CliRunner().invoke(compile_command, [*arguments, "--tokens", "128", "-q"])
    assert made.exit_code == 0, made.output
    before = sorted(path.name for path in tmp_path.iterdir())
    ids = np.arange(1, 20)[None]
    fast = open_session(output, ep="cpu").run(ids).logits
    with exact_copy(output) as copy:
        assert copy.parent == tmp_path
        exact = open_session(copy, ep="cpu").run(ids).logits
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert 0 < np.abs(fast - exact).max() < 0.3
