"""Random checkpoints as large as real ones, made small here: their layout and their routers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.mark.parametrize(
    ("name", "layers", "experts", "per_token"),
    [
        ("OLMoE-1B-7B", 3, 64, 8),
        ("Qwen1.5-MoE-A2.7B", 3, 60, 4),
        ("DeepSeek-V2-Lite", 2, 64, 6),
    ],
)
def test_a_full_size_checkpoint_is_one_of_its_model(
    load: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    layers: int,
    experts: int,
    per_token: int,
) -> None:
    import torch

    from alloc_moe.compiler.model.loading import load_model

    script = load("checkpoints/full_size")
    settings = script.MODELS[name] | {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3}
    for size in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        settings |= {size: 32} if size in settings else {}
    script.write_checkpoint(tmp_path, settings, shard_bytes=1 << 20)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert capsys.readouterr().out.split("\n")[:-1] == [f"Wrote {shard}" for shard in shards]
    assert len(shards) > 1
    moe = load_model(str(tmp_path))
    found = [(layer.num_experts, layer.experts_per_token) for layer in moe.layers]
    assert found == [(experts, per_token)] * layers
    chosen = torch.zeros(experts)
    with torch.no_grad():
        block = moe.model.get_submodule(moe.layers[0].name)
        states = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
        logits = states @ block.gate.weight.T
        chosen = logits.topk(per_token).indices.flatten().bincount(minlength=experts)
    assert 1.5 < float(logits.std()) < 2.5
    assert int((chosen > 0).sum()) > 0.9 * experts


def test_a_full_size_checkpoint_has_a_tensor_per_expert(
    load: Callable[[str], ModuleType],
) -> None:
    script = load("checkpoints/full_size")
    names = [
        *script.hub_tensors("model.layers.0.mlp.experts.gate_up_proj", [2, 8, 6]),
        *script.hub_tensors("model.layers.0.mlp.experts.down_proj", [1, 6, 4]),
        *script.hub_tensors("model.norm.weight", [6]),
    ]
    experts = "model.layers.0.mlp.experts"
    assert names == [
        (f"{experts}.0.gate_proj.weight", [4, 6]),
        (f"{experts}.0.up_proj.weight", [4, 6]),
        (f"{experts}.1.gate_proj.weight", [4, 6]),
        (f"{experts}.1.up_proj.weight", [4, 6]),
        (f"{experts}.0.down_proj.weight", [6, 4]),
        ("model.norm.weight", [6]),
    ]
