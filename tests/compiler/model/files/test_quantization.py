"""Quantised weights are what their formats say, and no others are taken for weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from alloc_moe.compiler import compile
from alloc_moe.compiler.errors import CheckpointError, UnsupportedModelError, VerificationError
from alloc_moe.compiler.model.checks import second_reading
from alloc_moe.compiler.model.files import stored
from alloc_moe.compiler.model.files.dequantize import undo_e8m0, undo_mxfp4, undo_scales
from alloc_moe.compiler.model.files.stored import open_weights
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.reader import CheckpointReader
from alloc_moe.compiler.model.skeleton import build_empty

_spec = importlib.util.spec_from_file_location(
    "quantized_checkpoints", Path(__file__).with_name("quantized_checkpoints.py")
)
assert _spec is not None
assert _spec.loader is not None
quantized = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(quantized)

IDS = torch.arange(3, 40)[None]
DIALECTS: dict[str, dict[str, Any]] = {
    "blocks that don't divide the sides": {},
    "blocks larger than the weights": {"block": (128, 128)},
    "powers of two as scales": {"ue8m0": True, "suffix": "scale"},
    "one scale per tensor": {"block": None, "suffix": "_scale"},
    "one scale per row": {"block": None, "by_row": True},
}


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "copy"))


@pytest.fixture
def plain(folder: Path, tmp_path: Path) -> Callable[[dict[str, torch.Tensor]], Path]:
    """Return a function that writes a checkpoint of floats beside."""

    def write(tensors: dict[str, torch.Tensor]) -> Path:
        other = Path(shutil.copytree(folder, tmp_path / "plain"))
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((other / "config.json").read_text())
        config.pop("quantization_config")
        (other / "config.json").write_text(json.dumps(config))
        return other

    return write


@pytest.mark.parametrize("dialect", DIALECTS)
def test_fp8_weights_are_dequantised(
    folder: Path, plain: Callable[[dict[str, torch.Tensor]], Path], dialect: str
) -> None:
    exact = quantized.quantize_fp8(folder, **DIALECTS[dialect])
    expected = load_model(str(plain(exact)), offload="never")
    in_memory, read = (load_model(str(folder), offload=mode) for mode in ("never", "always"))
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(in_memory.model.state_dict()[name], weight), name
        assert torch.equal(read.checkpoint.reader.read(name, torch.float32), weight), name
    with torch.no_grad():
        logits = [moe.model(input_ids=IDS).logits for moe in (expected, in_memory, read)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert "quantization_config" not in in_memory.config.to_dict()
    assert in_memory.checkpoint.notes == ()


def test_fp8_weights_are_those_that_transformers_dequantises(folder: Path) -> None:
    quantized.quantize_fp8(folder, block=(16, 32))  # it knows blocks that divide the sides only
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    ours = load_model(str(folder), offload="never").model.state_dict()
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours[name], weight.float(), rtol=1e-6, atol=0)


def test_scales_of_activations_are_left_alone(folder: Path) -> None:
    quantized.quantize_fp8(folder, block=None)
    name = "model.layers.0.self_attn.q_proj.input_scale"
    quantized.change(folder, lambda tensors: tensors.update({name: torch.ones(())}))
    assert load_model(str(folder)).checkpoint.notes == ()


def test_mxfp4_experts_are_those_that_transformers_dequantises(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt_oss",
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        vocab_size=48,
        num_local_experts=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts_per_tok=2,
    )
    config.save_pretrained(tmp_path)
    quantized.configure(tmp_path, quantization_config={"quant_method": "mxfp4"})
    random = torch.Generator().manual_seed(0)
    model = build_empty(config, torch.float32)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[name] = torch.randn(parameter.shape, generator=random)
        if parameter.ndim == 3:
            experts, inputs, outputs = parameter.shape
            shape = (experts, outputs, inputs // 32, 16)
            byte = torch.randint(256, shape, generator=random, dtype=torch.uint8)
            scale = torch.randint(100, 140, shape[:3], generator=random, dtype=torch.uint8)
            del tensors[name]
            tensors |= {f"{name}_blocks": byte, f"{name}_scales": scale}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = CheckpointReader(open_weights(tmp_path), model)
    for name in model.state_dict():
        expected = tensors.get(name)
        if expected is None:
            blocks, scales = (tensors[f"{name}_{part}"] for part in ("blocks", "scales"))
            expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert torch.equal(reader.read(name, torch.float32), expected), name
    assert reader.unread == []


@pytest.mark.slow
def test_an_mxfp4_checkpoint_compiles_layer_by_layer(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("gpt_oss"), tmp_path / "gpt_oss"))
    quantized.store_mxfp4(folder)
    made = compile(
        folder,
        budget=0.5,
        output=tmp_path / "out.onnx",
        dtype="int4",
        offload="always",
        tokens=256,
    )
    assert made.plan.verify["max_abs_logit_error"] < 1e-3
    assert made.plan.quantization["dtype"] == "int4"


def test_mxfp4_values_by_hand() -> None:
    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 0] = 0x7 | 0xC << 4  # 6, then -2
    values = undo_mxfp4(blocks, torch.tensor([[[128]]], dtype=torch.uint8))
    assert values.shape == (1, 32, 1)
    assert values[0, :3, 0].tolist() == [12.0, -4.0, 0.0]


def test_exponents_by_hand() -> None:
    bytes_ = torch.tensor([0, 126, 127, 254, 255], dtype=torch.uint8)
    assert undo_e8m0(bytes_)[:4].tolist() == [2.0**-127, 0.5, 1.0, 2.0**127]
    assert undo_e8m0(bytes_)[4].isnan()


def test_scales_of_fused_experts_by_hand() -> None:
    weight = torch.ones(2, 3, 5).to(torch.float8_e4m3fn)
    scale = torch.arange(12.0).reshape(2, 2, 3)
    values = undo_scales(weight, scale, (2, 2))
    assert values[1].tolist() == [[6, 6, 7, 7, 8], [6, 6, 7, 7, 8], [9, 9, 10, 10, 11]]
    assert undo_scales(weight, torch.tensor([3.0, 4.0]), (3, 5))[:, 0, 0].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "fbgemm_fp8"}, "quant_method fbgemm_fp8"),
        ({"quant_method": "modelopt"}, "quant_method modelopt"),
        ({"quant_method": "newer"}, "quant_method newer"),
        ({"quant_method": ["fp8"]}, r"quant_method \[\"fp8\"\]"),
        ({}, "quant_method null"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_other_methods_are_refused_by_name_before_anything_else(
    tmp_path: Path, settings: dict[str, Any], name: str, nested: bool
) -> None:
    said = {"quantization_config": settings}
    config = {"model_type": "nonsense"} | ({"text_config": said} if nested else said)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=f"quantised by {name}, which can't be compi"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("tensor", "name"),
    [("q_proj.qweight", "GPTQ or AWQ"), ("q_proj.weight.absmax", "bitsandbytes")],
)
def test_methods_that_no_configuration_names_are_refused_too(
    folder: Path, tensor: str, name: str
) -> None:
    quantized.change(folder, lambda tensors: tensors.update({f"model.{tensor}": torch.zeros(1)}))
    with pytest.raises(UnsupportedModelError, match=rf"by {name} \(it has the tensor model\.q_"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int32, torch.bool]
)
@pytest.mark.parametrize("kept", ["q_proj.weight", "experts.3.up_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("mode", ["never", "always"])
def test_numbers_that_are_no_floats_are_refused_for_a_float(
    folder: Path, dtype: torch.dtype, kept: str, mode: Any
) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(kept))
        tensors[name] = tensors[name].to(dtype)

    quantized.change(folder, edit)
    with pytest.raises(CheckpointError, match=r"is a float, and config\.json names no quantizati"):
        load_model(str(folder), offload=mode)


def test_float8_without_scales_is_refused(folder: Path) -> None:
    quantized.quantize_fp8(folder)
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    quantized.change(folder, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(CheckpointError, match=rf"its scales {name} are missing"):
        load_model(str(folder))


def test_scales_that_fit_no_blocks_are_refused(folder: Path) -> None:
    quantized.quantize_fp8(folder)
    quantized.configure(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=r"shape \[\d+, \d+\], .* with blocks of 128 by 128"):
        load_model(str(folder))


@pytest.mark.parametrize("size", [0, [128], [0, 128], "128", [128, 1.5], [1 << 30, 1]])
def test_blocks_that_are_none_are_refused(folder: Path, size: Any) -> None:
    quantized.quantize_fp8(folder)
    settings = {"quant_method": "fp8", "weight_block_size": size}
    quantized.configure(folder, quantization_config=settings)
    with pytest.raises(CheckpointError, match="not two positive whole numbers"):
        load_model(str(folder))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_no_numbers_are_refused(folder: Path, bad: float) -> None:
    quantized.quantize_fp8(folder)
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    quantized.change(folder, lambda tensors: tensors[name].__setitem__((0, 0), bad))
    with pytest.raises(CheckpointError, match="negative or no numbers"):
        load_model(str(folder), offload="always")
    with pytest.raises(CheckpointError, match="negative or no numbers"):
        load_model(str(folder), offload="never")


def test_scales_of_floats_are_refused(folder: Path) -> None:
    quantized.quantize_fp8(folder)
    name = "model.norm.weight_scale_inv"
    quantized.change(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(CheckpointError, match="only float8 weights have"):
        load_model(str(folder))


@pytest.mark.parametrize("mode", ["never", "always"])
def test_a_reader_that_forgets_scales_is_found_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    quantized.quantize_fp8(folder)
    monkeypatch.setattr(stored, "undo_scales", lambda weight, *_: weight.float())
    with pytest.raises(VerificationError, match=r"_proj.* is read in two ways that differ by up t"):
        load_model(str(folder), offload=mode)


def test_a_reader_that_takes_one_expert_for_another_is_found_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = CheckpointReader.read

    def turned(self: CheckpointReader, name: str, dtype: torch.dtype) -> torch.Tensor:
        weight = read(self, name, dtype)
        return weight.flip(0) if "experts" in name else weight

    monkeypatch.setattr(CheckpointReader, "read", turned)
    with pytest.raises(VerificationError, match=r"experts\.\w+ of .* in two ways that differ by"):
        load_model(str(folder), offload="always")


def test_weights_that_transformers_loads_are_read_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The artifact's weights come through the reader, PyTorch's don't: verification compares them.
    monkeypatch.setattr(second_reading, "_read_again", lambda *_: pytest.fail("read again"))
    load_model(str(folder), offload="never")
