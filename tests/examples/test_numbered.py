"""Every numbered example runs as written, on a small model."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    """Import a script, whose name need not be an identifier."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_compile_and_generate(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = load("01_compile_and_generate.py").main
    main(str(checkpoint("olmoe")), f"{tmp_path / 'half'}/", tokens=256, new_tokens=4)
    printed = capsys.readouterr().out
    assert re.search(
        r"^Experts per layer: \d\.\d\d \d\.\d\d \d\.\d\d, trained with 4$", printed, re.M
    )
    assert "'In the beginning' -> " in printed
    assert (tmp_path / "half" / "genai_config.json").is_file()


def test_many_budgets(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint("olmoe")
    text = str(model / "calibration.txt")
    load("02_many_budgets.py").main(str(model), str(tmp_path), text, tokens=256)
    printed = capsys.readouterr().out.splitlines()
    names = [f"budget-{budget}.onnx" for budget in ("0.25", "0.5", "0.75")]
    assert [line.partition(" made in ")[0] for line in printed[:3]] == names
    assert {path.name for path in tmp_path.glob("*.onnx")} == set(names)
    half = "budget-0.5.onnx"
    found = [re.fullmatch(r"(\S+) at (\S+): (\S+) experts, loss \d\.\d{4}", p) for p in printed[3:]]
    assert [match[1] for match in found if match] == [half, names[0], half, half, names[2]]
    for match in found:
        assert match is not None
        assert float(match[3]) == pytest.approx(12 * float(match[2]), rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layers"), [("olmoe", 6), ("qwen3_moe", 5)])
def test_training_makes_a_model_that_loads(tmp_path: Path, family: str, layers: int) -> None:
    from alloc_moe.compiler.model.loading import load_model

    words = ["experts", "router", "layer", "token", "the", "of", "a", "few", "are", "enough"]
    random = Random(0)
    documents = [" ".join(random.choices(words, k=180)) for _ in range(40)]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(documents), "utf-8")
    command = [sys.executable, EXAMPLES / "train_tiny_moe.py", "--text", "text.txt"]
    options = ["--work", "work", "--out", "out", "--minutes", "0.05", "--vocab-size", "300"]
    options += ["--family", family]
    subprocess.run([*command, *options], cwd=tmp_path, check=True, capture_output=True)
    moe = load_model(str(tmp_path / "out"))
    assert moe.config.model_type == family
    assert [layer.experts_per_token for layer in moe.layers] == [8] * layers


def test_every_example_is_tested() -> None:
    names = {path.name for path in EXAMPLES.glob("[0-9]*.py")}
    assert names == {"01_compile_and_generate.py", "02_many_budgets.py"}


@pytest.mark.parametrize(
    ("name", "layers", "experts", "per_token"),
    [
        ("OLMoE-1B-7B", 3, 64, 8),
        ("Qwen1.5-MoE-A2.7B", 3, 60, 4),
        ("DeepSeek-V2-Lite", 2, 64, 6),
    ],
)
def test_a_full_size_checkpoint_is_one_of_its_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    layers: int,
    experts: int,
    per_token: int,
) -> None:
    import torch

    from alloc_moe.compiler.model.loading import load_model

    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = load("full_size_checkpoint.py")
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = load("full_size_checkpoint.py")
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
