"""Whole compiles to checkpoints for transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alloc_moe.compiler.checkpoints import shards
from alloc_moe.compiler.errors import (
    CheckpointError,
    OptionsError,
    OutputError,
    VerificationError,
)
from alloc_moe.compiler.model.checkpoint import open_checkpoint
from alloc_moe.compiler.records import Compiled
from alloc_moe.compiler.verify import parity
from alloc_moe.runtime.artifact.files import checkpoint_plan, find_artifact
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.commands.alloc_inspect import inspect_command
from alloc_moe.runtime.errors import ArtifactError

Compile = Callable[..., Compiled]
PLAIN: dict[str, Any] = {"allocation": "uniform", "redistribute": "none", "correct": "none"}


@pytest.fixture
def write(compile_to: Compile, tmp_path: Path) -> Compile:
    """Return a function from options to what a compile to a checkpoint made."""
    return lambda **options: compile_to(tmp_path / "out", target="checkpoint", **options)


def test_a_corrected_checkpoint_has_all_that_the_plan_needs(write: Compile) -> None:
    compiled = write()
    folder = compiled.path
    assert compiled.verification.max_abs_logit_error < 1e-4
    assert sorted(path.name for path in folder.iterdir()) == [
        ".alloc-moe-files.json",
        "alloc_plan.json",
        "alloc_plan.safetensors",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert checkpoint_plan(folder) == compiled.plan
    data = json.loads((folder / "alloc_plan.json").read_text())
    assert data["checkpoint"] == {"dtype": "float32", "shifts": "alloc_plan.safetensors"}
    shifts = load_file(folder / "alloc_plan.safetensors")
    kinds = compiled.plan.correction["layers"]
    expected = {
        f"{entry['experts_module']}.shift"
        for entry, kind in zip(data["layers"], kinds, strict=True)
        if kind == "affine"
    }
    assert shifts.keys() == expected != set()
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert {tuple(shift.shape) for shift in shifts.values()} == {
        (config.num_experts, config.hidden_size)
    }
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids


def test_what_a_gain_changes_has_a_place_in_the_weights(write: Compile) -> None:
    folder = write(redistribute="threshold", correct="gain").path
    assert "shifts" not in json.loads((folder / "alloc_plan.json").read_text())["checkpoint"]
    assert not (folder / "alloc_plan.safetensors").exists()


def test_layers_that_are_read_when_they_run_give_the_same_files(
    write: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    found = []
    for offload in ("never", "always"):
        folder = write(**PLAIN, offload=offload, force=True).path
        found.append({path.name: path.read_bytes() for path in folder.glob("model*")})
    assert found[0] == found[1]
    assert "model.safetensors.index.json" in found[0]
    AutoModelForCausalLM.from_pretrained(folder)


def test_bfloat16_is_what_transformers_loads(write: Compile) -> None:
    compiled = write(**PLAIN, dtype="bfloat16")
    assert 0 < compiled.verification.kl < parity.MAX_KL["bfloat16"]
    model = AutoModelForCausalLM.from_pretrained(compiled.path)
    assert str(model.dtype) == "torch.bfloat16"


def test_an_old_folder_stays_where_the_new_one_differs(
    write: Compile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = write(**PLAIN).path
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputError, match=r"out exists\. Give --force to replace it"):
        write(**PLAIN)
    monkeypatch.setattr(parity, "MAX_LOGIT_ERROR", -1.0)
    with pytest.raises(VerificationError, match="differ from PyTorch's by up to"):
        write(**PLAIN, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_and_a_bundle_replace_each_other(
    compile_to: Compile, write: Compile, tmp_path: Path
) -> None:
    compile_to(tmp_path / "out", **PLAIN)
    (tmp_path / "out" / "mine.txt").write_text("kept")
    folder = write(**PLAIN, force=True).path
    assert not (folder / "model.onnx").exists()
    assert (folder / "mine.txt").read_text() == "kept"
    compile_to(tmp_path / "out", **PLAIN, force=True)
    assert not (folder / "model.safetensors").exists()
    assert (folder / "mine.txt").read_text() == "kept"


def test_weights_that_were_written_are_used_after_an_interruption(
    write: Compile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("alloc_moe.compiler.checkpoints.build.verify_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(**PLAIN)
    left = tmp_path / ".out.partial"
    names = {path.name for path in left.iterdir() if path.name.startswith("model")}
    assert names == {"model.safetensors", "model.safetensors.journal"}
    monkeypatch.setattr(shards, "_save", interrupted)
    assert write(**PLAIN).path.is_dir()
    assert not left.exists()


@pytest.mark.parametrize("target", ["checkpoint", None])
def test_what_an_interrupted_compile_left_is_in_no_other(
    write: Compile,
    compile_to: Compile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str | None,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 1)
        patch.setattr("alloc_moe.compiler.checkpoints.build.verify_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(**PLAIN)
    assert [*(tmp_path / ".out.partial").glob("model-00001-*")]
    folder = compile_to(tmp_path / "out", **PLAIN, target=target).path
    weights = {path.name for path in folder.iterdir() if path.name.startswith("model")}
    bundle = {"model.onnx", "model.onnx.data"}
    assert weights == (bundle if target is None else {"model.safetensors"})
    assert not (tmp_path / ".out.partial").exists()


def test_what_is_no_artifact_says_so(write: Compile) -> None:
    folder = write(**PLAIN).path
    outcome = CliRunner().invoke(inspect_command, [str(folder)])
    assert outcome.exit_code == 0
    assert "redistribution  none" in outcome.output
    outcome = CliRunner().invoke(inspect_command, [str(folder), "--json"])
    assert json.loads(outcome.stdout)["redistribution"] == "none"
    outcome = CliRunner().invoke(inspect_command, [str(folder), "--check"])
    assert outcome.exit_code == 1
    with pytest.raises(ArtifactError, match=r"out is a checkpoint for transformers, under the"):
        find_artifact(folder)


def test_what_was_corrected_is_not_compiled_again(write: Compile) -> None:
    folder = write(**PLAIN).path
    assert open_checkpoint(str(folder)).layers
    path = folder / "alloc_plan.json"
    data = json.loads(path.read_text())
    said = r"out was written by --target checkpoint: .* Give the original model, .*olmoe"
    for layers in (["none", "affine", "none"], [["affine"]], 3):
        path.write_text(json.dumps(data | {"correction": {"layers": layers}}))
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(str(folder))
    path.write_text(json.dumps(data | {"correction": {"layers": ["none"] * len(data["layers"])}}))
    assert open_checkpoint(str(folder)).layers
    path.write_text(AllocationPlan.from_json(path.read_bytes()).to_json()[:-1])
    with pytest.raises(ArtifactError, match="The allocation plan can't be read"):
        open_checkpoint(str(folder))
    path.rename(path.with_suffix(".safetensors"))
    with pytest.raises(CheckpointError, match=r"has a .* but no alloc_plan\.json: .* the original"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "--dtype int4"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"cache": "int8"}, "--cache int8"),
        ({"device": "cuda"}, "--device cuda"),
        ({"block": 32}, "--block 32"),
    ],
)
def test_what_only_onnx_has_is_refused_before_the_model_is_loaded(
    write: Compile, options: dict[str, Any], message: str
) -> None:
    said = rf"{message} is for ONNX artifacts; a checkpoint has float32, float16, bfloat16, which"
    with pytest.raises(OptionsError, match=said):
        write(model="nowhere", **options)


def test_code_of_a_model_is_not_written(write: Compile) -> None:
    with pytest.raises(OptionsError, match="--target checkpoint writes no code, without which"):
        write(model="nowhere", trust_remote_code=True)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("out.onnx", "checkpoint", "writes a folder, not the file out.onnx. Write .*out/, or"),
        (
            "out/",
            "torchscript",
            "one file, tokenizer included, not a folder. Write .*out/model.pt,",
        ),
        ("out/", "export", "one file, tokenizer included, not a folder. Write .*model.pt2, or"),
        ("out.onnx", "export", "a file that ends in .pt2, not out.onnx. Write .*out.pt2, or"),
    ],
)
def test_a_name_that_says_something_else_is_refused(
    compile_to: Compile, tmp_path: Path, name: str, target: str, message: str
) -> None:
    with pytest.raises(OutputError, match=rf"--target {target} .*{message}"):
        compile_to(f"{tmp_path}/{name}", model="nowhere", target=target)


def test_an_unknown_target_is_refused(compile_to: Compile, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"--target can't be 'chekpoint'. Did you mean chec"):
        compile_to(tmp_path / "out", model="nowhere", target="chekpoint")
