"""Random checkpoints as large as real ones, made small here: their layout and their routers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("name", "layers", "experts", "per_token"),
    [
        ("OLMoE-1B-7B", 3, 64, 8),
        ("Qwen1.5-MoE-A2.7B", 3, 60, 4),
        ("DeepSeek-V2-Lite", 2, 64, 6),
        ("gpt-oss-20b", 3, 32, 4),
        ("Qwen3.5-35B-A3B", 4, 256, 8),
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
    settings = script.MODELS[name]
    given = settings.get("text_config", settings)
    sizes = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": max(3, layers)}
    for size in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        sizes |= {size: 32} if size in given else {}
    settings = script.with_text(settings, sizes)
    script.write_checkpoint(tmp_path, settings, shard_bytes=1 << 20)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert capsys.readouterr().out.split("\n")[:-1] == [f"Wrote {shard}" for shard in shards]
    assert len(shards) > 1
    moe = load_model(str(tmp_path))
    scales = [_scaled(norm) for norm in norms(moe.model)]
    assert len(scales) > 2 * layers
    assert max(abs(scale - 1) for scale in scales) < 0.2
    found = [(layer.num_experts, layer.experts_per_token) for layer in moe.layers]
    assert found == [(experts, per_token)] * layers
    chosen = torch.zeros(experts)
    with torch.no_grad():
        block = moe.model.get_submodule(moe.layers[0].name)
        states = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
        router = block.router if hasattr(block, "router") else block.gate
        logits = states @ router.weight.T
        chosen = logits.topk(per_token).indices.flatten().bincount(minlength=experts)
    assert 1.5 < float(logits.std()) < 2.5
    assert int((chosen > 0).sum()) > 0.9 * experts


def norms(model: Any) -> list[Any]:
    """Return the modules that scale what enters a decoder layer, and what leaves the last."""
    return [module for name, module in model.named_modules() if name.endswith("norm")]


def _scaled(norm: Any) -> float:
    """Return by what a norm multiplies, in the mean."""
    import torch

    size, ones = norm.weight.numel(), torch.ones(1, norm.weight.numel())
    gate = (torch.full((1, size), 1.2785),) if "Gated" in type(norm).__name__ else ()  # SiLU: 1
    with torch.no_grad():
        return float(norm(ones, *gate).mean())


EXPERTS = "model.layers.0.mlp.experts"
PARAMETERS = [
    (f"{EXPERTS}.gate_up_proj", [2, 64, 32]),
    (f"{EXPERTS}.down_proj", [1, 32, 32]),
    ("model.norm.weight", [32]),
]


@pytest.mark.parametrize(
    ("layout", "tensors"),
    [
        (
            "single",
            [
                (f"{EXPERTS}.0.gate_proj.weight", [32, 32], "BF16"),
                (f"{EXPERTS}.0.up_proj.weight", [32, 32], "BF16"),
                (f"{EXPERTS}.1.gate_proj.weight", [32, 32], "BF16"),
                (f"{EXPERTS}.1.up_proj.weight", [32, 32], "BF16"),
                (f"{EXPERTS}.0.down_proj.weight", [32, 32], "BF16"),
                ("model.norm.weight", [32], "BF16"),
            ],
        ),
        (
            "mxfp4",
            [
                (f"{EXPERTS}.gate_up_proj_blocks", [2, 32, 2, 16], "U8"),
                (f"{EXPERTS}.gate_up_proj_scales", [2, 32, 2], "U8"),
                (f"{EXPERTS}.down_proj_blocks", [1, 32, 1, 16], "U8"),
                (f"{EXPERTS}.down_proj_scales", [1, 32, 1], "U8"),
                ("model.norm.weight", [32], "BF16"),
            ],
        ),
        (
            "fused",
            [
                ("model.language_model.layers.0.mlp.experts.gate_up_proj", [2, 64, 32], "BF16"),
                ("model.language_model.layers.0.mlp.experts.down_proj", [1, 32, 32], "BF16"),
                ("model.language_model.norm.weight", [32], "BF16"),
            ],
        ),
    ],
)
def test_a_full_size_checkpoint_has_the_tensors_of_the_hub(
    load: Callable[[str], ModuleType], layout: str, tensors: list[tuple[str, list[int], str]]
) -> None:
    script = load("checkpoints/full_size")
    found = [each[:3] for given in PARAMETERS for each in script.hub_tensors(*given, layout)]
    assert found == tensors
