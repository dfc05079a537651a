"""Whole compiles. The export, which takes most of their time, is done once for all."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from alloc_moe.compiler import artifact, pipeline
from alloc_moe.compiler.errors import (
    BudgetError,
    CheckpointError,
    OutputError,
    ProfileError,
    VerificationError,
)
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.records import CalibrationOptions, Compiled
from alloc_moe.compiler.sensitivity import measuring as sensitivity
from alloc_moe.runtime.artifact.plan import MODEL_FILE, PLAN_FILE
from alloc_moe.runtime.console import Console
from alloc_moe.runtime.execution.session import open_session

Compile = Callable[..., Compiled]

FILES = ("out.onnx", "out.onnx.data", "out.onnx.profile.json")
TOKEN_SIZES = "out.onnx.profile.json.token-sizes.json"

# A profile that is measured layer by layer, and a plan that is met exactly.
BY_LAYER = {"sensitivity": "kl", "redistribute": "batch"}

# A compile in a process of its own that is killed in the middle.
KILLED = """
import os, signal, sys
import onnx_ir as ir
import torch
from alloc_moe.compiler import artifact, compile
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.sensitivity import measuring as sensitivity
moment, graph, model, output = sys.argv[1:]
torch.set_num_threads(1)
artifact.export_model = lambda moe, **_: ir.load(graph)
measure, save = sensitivity.ReplayRun.measure, package.save_graph

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "profiling":
    sensitivity.ReplayRun.measure = lambda self, layer, advance: (
        die() if layer == 1 else measure(self, layer, advance)
    )
else:
    package.save_graph = lambda graph, path, **_: save(graph, path, advance=die)
by_layer = {"sensitivity": "kl", "redistribute": "batch"}  # BY_LAYER
compile(model, output=output, tokens=256, force=True, **by_layer)
"""


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers whose sensitivity is measured during the test, by a metric of single layers."""
    layers: list[int] = []
    measure = sensitivity.ReplayRun.measure

    def record(self: sensitivity.ReplayRun, layer: int, advance: Callable[[float], None]) -> object:
        layers.append(layer)
        return measure(self, layer, advance)

    monkeypatch.setattr(sensitivity.ReplayRun, "measure", record)
    return layers


def test_a_compile_leaves_artifact_and_profile(compile_to: Compile, tmp_path: Path) -> None:
    compiled = compile_to(tmp_path / "out.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, TOKEN_SIZES}
    assert compiled.path == tmp_path / "out.onnx"
    assert compiled.profile == tmp_path / "out.onnx.profile.json"
    session = open_session(compiled.path, ep="cpu", count_activations=True)
    assert session.plan == compiled.plan
    assert session.plan.verify == compiled.verification.to_plan()
    assert sum(layer.k for layer in session.plan.layers) == session.plan.budget.activations
    assert 5.9 < session.plan.budget.activations <= 6


def test_the_plan_is_executed_on_the_calibration_text(
    compile_to: Compile, moe_model: Callable[[str], MoeModel], tmp_path: Path
) -> None:
    plan = compile_to(tmp_path / "out.onnx").plan
    session = open_session(tmp_path / "out.onnx", ep="cpu", count_activations=True)
    options = CalibrationOptions(tokens=256)
    text = pipeline.calibrate(moe_model("olmoe").checkpoint, options, Console(quiet=True))
    executed = session.run(text.ids).activations
    assert executed == pytest.approx([layer.k * 256 for layer in plan.layers], abs=1.5)  # near ties


def test_an_exact_plan_is_executed_on_any_text(compile_to: Compile, tmp_path: Path) -> None:
    plan = compile_to(tmp_path / "out.onnx", redistribute="batch").plan
    assert sum(layer.k for layer in plan.layers) == plan.budget.activations <= 6
    session = open_session(tmp_path / "out.onnx", ep="cpu", count_activations=True)
    ids = np.random.default_rng(0).integers(0, 256, (2, 9))
    assert session.run(ids).activations == tuple(layer.k * 18 for layer in plan.layers)


def test_the_plan_says_what_it_was_made_of(
    compile_to: Compile, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = compile_to(tmp_path / "out.onnx", seed=5, redistribute="none", weights="renorm").plan
    assert plan.source == str(checkpoint("olmoe"))
    assert (plan.redistribution, plan.weights) == ("none", "renorm")
    assert plan.sensitivity["metric"] == "fisher"
    assert plan.sensitivity["seed"] == 5
    assert {"alloc-moe", "torch", "transformers", "onnxruntime"} <= set(plan.versions)
    assert [layer.name for layer in plan.layers] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert plan.correction["mode"] == "affine"
    assert len(plan.correction["layers"]) == 3


def test_by_default_an_artifact_has_a_price_a_dial_and_corrected_experts(
    compile_to: Compile, tmp_path: Path
) -> None:
    plan = compile_to(tmp_path / "out.onnx").plan
    assert plan.redistribution == "price"
    assert plan.price is not None
    assert plan.dial[0].activations > 6 > plan.dial[-1].activations
    assert plan.correction["mode"] == "affine"
    plain = compile_to(tmp_path / "plain.onnx", correct="none").plan
    assert plain.correction == {}


def test_the_same_compile_twice_gives_the_same_bytes(compile_to: Compile, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        compile_to(tmp_path / folder / "out.onnx")
    for name in FILES[:2]:
        first, second = (tmp_path / folder / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), name


def test_a_bundle_has_graph_plan_and_tokenizer(compile_to: Compile, tmp_path: Path) -> None:
    compiled = compile_to(f"{tmp_path / 'half'}/")
    beside = {"half.profile.json", "half.profile.json.token-sizes.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"half", *beside}
    names = {path.name for path in (tmp_path / "half").iterdir()}
    assert {MODEL_FILE, f"{MODEL_FILE}.data", PLAN_FILE, "tokenizer.json"} <= names
    written = json.loads((tmp_path / "half" / PLAN_FILE).read_text())
    assert written == json.loads(compiled.plan.to_json())
    assert open_session(tmp_path / "half", ep="cpu").plan == compiled.plan


@pytest.mark.parametrize(
    "options",
    [
        {"budget": "1.0", "redistribute": "batch"},
        {"allocation": "uniform"},
        {"redistribute": "top-p"},
    ],
)
def test_no_profile_is_made_that_is_not_needed(
    compile_to: Compile, measured: list[int], tmp_path: Path, options: dict[str, str]
) -> None:
    compiled = compile_to(tmp_path / "out.onnx", **options)
    assert compiled.profile is None
    assert {path.name for path in tmp_path.iterdir()} == set(FILES[:2])
    assert measured == []


def test_the_dial_of_a_full_budget_needs_a_profile(compile_to: Compile, tmp_path: Path) -> None:
    compiled = compile_to(tmp_path / "out.onnx", budget="1.0")
    assert compiled.plan.budget.activations == 12
    assert compiled.plan.dial[-1].activations < 6
    assert compiled.profile == tmp_path / "out.onnx.profile.json"
    assert compiled.profile.is_file()


@pytest.mark.parametrize(
    ("metric", "redistribution", "least"), [("kl", "batch", 9), ("fisher", "price", 8.9)]
)
def test_a_profile_serves_every_budget(
    compile_to: Compile,
    measured: list[int],
    tmp_path: Path,
    metric: str,
    redistribution: str,
    least: float,
) -> None:
    options = {
        "profile": tmp_path / "profile.json",
        "sensitivity": metric,
        "redistribute": redistribution,
    }
    compile_to(tmp_path / "half.onnx", **options)
    assert measured == ([0, 1, 2] if metric == "kl" else [])
    before = options["profile"].read_bytes()
    compiled = compile_to(tmp_path / "most.onnx", budget="0.75", **options)
    assert least <= compiled.plan.budget.activations <= 9
    assert measured == ([0, 1, 2] if metric == "kl" else [])
    assert options["profile"].read_bytes() == before  # its seconds too


def test_a_profile_of_something_else_is_refused(compile_to: Compile, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    compile_to(tmp_path / "half.onnx", profile=profile)
    with pytest.raises(ProfileError, match="seed"):
        compile_to(tmp_path / "other.onnx", profile=profile, seed=1)
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize("budget", ["0.1", "2", "13", "half"])
def test_a_budget_that_cant_be_met_is_refused(
    compile_to: Compile, tmp_path: Path, budget: str
) -> None:
    with pytest.raises(BudgetError, match=budget):
        compile_to(tmp_path / "out.onnx", budget=budget)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept_without_force(compile_to: Compile, tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_text("mine")
    with pytest.raises(OutputError, match="Give --force"):
        compile_to(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_text() == "mine"
    compile_to(tmp_path / "out.onnx", allocation="uniform", redistribute="batch", force=True)
    assert open_session(tmp_path / "out.onnx", ep="cpu").plan.budget.activations == 6


def test_what_fails_verification_is_not_written(
    compile_to: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise VerificationError("wrong")

    monkeypatch.setattr(artifact, "verify_artifact", refuse)
    (tmp_path / "out.onnx").write_text("old")
    with pytest.raises(VerificationError):
        compile_to(tmp_path / "out.onnx", allocation="uniform", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    assert (tmp_path / "out.onnx").read_text() == "old"


def test_bfloat16_is_refused_before_any_work(
    compile_to: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "alloc_moe.compiler.verify.parity.cuda_obstacle", lambda: "no driver was found"
    )
    with pytest.raises(VerificationError, match="runs on CUDA only"):
        compile_to(tmp_path / "out.onnx", dtype="bfloat16", model="never read")


def test_a_model_that_is_not_there_is_reported(compile_to: Compile, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a model id"):
        compile_to(tmp_path / "out.onnx", model="./gone")


def test_without_a_text_beside_the_model_the_built_in_one_is_taken(
    moe_model: Callable[[str], MoeModel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = dataclasses.replace(moe_model("olmoe").checkpoint, folder=tmp_path)
    found = pipeline.calibrate(checkpoint, CalibrationOptions(tokens=256), Console())
    assert found.tokens == 256
    assert "Calibrating on the built-in text" in capsys.readouterr().err


@pytest.fixture
def killed(
    exported: Callable[[str], ir.Model],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    warm: Any,
) -> Callable[[str, Path], None]:
    """Return a function that compiles to an output in a process that is killed at a moment."""
    graph = tmp_path / "graph.onnx"
    package.save_graph(exported("olmoe"), graph)

    def run(moment: str, output: Path) -> None:
        done = warm.run(KILLED, moment, graph, checkpoint("olmoe"), output)
        assert done.returncode == -signal.SIGKILL, done.stderr

    return run


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_compile_killed_while_profiling_is_resumed(
    killed: Callable[[str, Path], None],
    compile_to: Compile,
    measured: list[int],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    killed("profiling", folder / "out.onnx")
    left = {"out.onnx.profile.json", ".out.onnx.passes"}
    assert {path.name for path in folder.iterdir()} == left
    rows = json.loads((folder / "out.onnx.profile.json").read_text())["costs"]
    assert [row is None for row in rows] == [False, True, True]
    compile_to(folder / "out.onnx", **BY_LAYER)
    assert measured == [1, 2]
    assert json.loads((folder / "out.onnx.profile.json").read_text())["costs"][0] == rows[0]
    assert {path.name for path in folder.iterdir()} == set(FILES)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_compile_killed_while_writing_leaves_the_old_artifact(
    killed: Callable[[str, Path], None],
    compile_to: Compile,
    measured: list[int],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    for name in FILES[:2]:
        (folder / name).write_text(f"old {name}")
    killed("writing", folder / "out.onnx")
    assert {path.name for path in folder.iterdir()} == {
        *FILES,
        ".out.onnx.partial",
        ".out.onnx.passes",
    }
    for name in FILES[:2]:
        assert (folder / name).read_text() == f"old {name}"
    compile_to(folder / "out.onnx", force=True, **BY_LAYER)
    assert measured == []  # the profile was complete
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert open_session(folder / "out.onnx", ep="cpu").plan.budget.activations == 6


def test_a_full_disk_is_reported_before_anything_is_measured(
    compile_to: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package.shutil, "disk_usage", lambda _: SimpleNamespace(free=10 << 20))
    with pytest.raises(OutputError, match=r"needs 0\.06 GiB, but .* has 0\.01 GiB free"):
        compile_to(tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []
