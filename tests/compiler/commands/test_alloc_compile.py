"""alloc-compile on a small model: options in, exit code out."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from alloc_moe.compiler import artifact
from alloc_moe.compiler.commands.alloc_compile import compile_command
from alloc_moe.compiler.commands.alloc_eval import eval_command
from alloc_moe.compiler.commands.alloc_profile import profile_command
from alloc_moe.compiler.errors import need_compile_extra
from alloc_moe.compiler.planning import latency
from alloc_moe.compiler.planning.latency import LayerLatency
from alloc_moe.compiler.planning.shapes import ExpertShape
from alloc_moe.runtime.artifact.files import find_artifact
from alloc_moe.runtime.artifact.plan import PLAN_KEY
from alloc_moe.runtime.commands.alloc_run import run_command
from alloc_moe.runtime.errors import AllocMoeError


def compiled(model: str, output: Path, *options: str | Path) -> Result:
    arguments = [model, "--budget", "0.5", "--tokens", "256", "-o", str(output)]
    return CliRunner().invoke(compile_command, [*arguments, *map(str, options)])


def test_a_compile_says_what_it_wrote(model: str, tmp_path: Path) -> None:
    outcome = compiled(model, tmp_path / "out.onnx")
    assert outcome.exit_code == 0, outcome.stderr
    first, second, third = outcome.stdout.splitlines()
    plan = find_artifact(tmp_path / "out.onnx").plan
    assert 5.9 < plan.budget.activations <= 6
    assert first == (
        f"Wrote {tmp_path / 'out.onnx'}: {plan.budget.activations:.6g} of 12 expert activations "
        "per token, redistribution price"
    )
    assert second == f"Experts per layer: {' '.join(f'{layer.k:.4g}' for layer in plan.layers)}"
    assert re.fullmatch(r"Largest logit error .* \d\.\de-\d\d over 108 tokens", third)


def test_whole_numbers_of_experts_are_told_as_such(model: str, tmp_path: Path) -> None:
    outcome = compiled(model, tmp_path / "out.onnx", "--redistribute", "batch")
    first, second, third = outcome.stdout.splitlines()
    assert first == (
        f"Wrote {tmp_path / 'out.onnx'}: 6 of 12 expert activations per token, redistribution batch"
    )
    ks = [layer.k for layer in find_artifact(tmp_path / "out.onnx").plan.layers]
    assert second == f"Experts per layer: {' '.join(map(str, ks))}"
    assert re.fullmatch(r"Largest logit error .* \d\.\de-\d\d over 54 tokens", third)


def test_json_is_one_object_on_stdout(model: str, tmp_path: Path) -> None:
    outcome = compiled(model, tmp_path / "out.onnx", "--json", "--profile", tmp_path / "p.json")
    data = json.loads(outcome.stdout)
    assert outcome.stdout.count("\n") == 1
    plan = find_artifact(tmp_path / "out.onnx").plan
    assert data == {
        "output": str(tmp_path / "out.onnx"),
        "profile": str(tmp_path / "p.json"),
        "plan": json.loads(plan.to_json()),
    }


def test_a_metric_without_sizes_sets_thresholds_by_itself(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    options = ["--sensitivity", "kl", "--correct", "none", "--json", "-q"]
    outcome = compiled(model, out, *options)
    assert outcome.exit_code == 0, outcome.stderr
    plan = json.loads(outcome.stdout)["plan"]
    assert plan["redistribution"] == "threshold"
    assert plan["sensitivity"]["metric"] == "kl"
    asked = compiled(model, out, "--force", "--redistribute", "price", *options)
    assert asked.exit_code == 2
    assert "sizes of experts, which --sensitivity kl doesn't measure" in asked.stderr


def test_quiet_says_nothing_but_the_result(model: str, tmp_path: Path) -> None:
    outcome = compiled(model, tmp_path / "out.onnx", "-q", "--allocation", "uniform")
    assert outcome.stderr == ""
    assert outcome.stdout.startswith("Wrote ")


@pytest.fixture(scope="module")
def alone(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A compile by the installed command, with every library's notes at their defaults."""
    command = shutil.which("alloc-compile", path=str(Path(sys.executable).parent))
    assert command is not None, "alloc-compile is not installed"
    output = tmp_path_factory.mktemp("alone") / "out.onnx"
    arguments = [str(checkpoint("mixtral")), "--budget", "0.75", "--tokens", "256"]
    done = subprocess.run(
        [command, *arguments, "-o", str(output)],
        capture_output=True,
        text=True,
        check=True,
        # As many as the tests have: among how many a sum is divided changes its last bits.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done, output


def without_plan(path: Path) -> bytes:
    model = ir.load(path)
    del model.metadata_props[PLAN_KEY]
    return ir.to_proto(model).SerializeToString()


def test_nothing_but_the_command_speaks(
    alone: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, _ = alone
    assert done.stdout.count("\n") == 3
    started = re.compile(
        "Loading|mixtral: 2 MoE layers, 8 experts, top-2|Calibrating on|Profiling: |"
        "Fitting token sizes: |Measuring overlap: |Setting thresholds: |Correcting: |"
        "Layers where --correct affine|Measuring the dial: |Exporting the graph: |"
        "Writing weights: |Verifying against PyTorch: "
    )
    assert [line for line in done.stderr.splitlines() if not started.match(line)] == []
    assert "\r" not in done.stderr


def test_two_exports_of_a_model_are_equal(
    alone: tuple[subprocess.CompletedProcess[str], Path],
    checkpoint: Callable[[str], Path],
    exported: Callable[[str], ir.Model],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    _, first = alone
    monkeypatch.setattr(artifact, "export_model", lambda *_, **__: exported("mixtral"))
    second = tmp_path / "out.onnx"
    assert compiled(str(checkpoint("mixtral")), second, "--budget", "0.75").exit_code == 0
    data = ".onnx.data"
    assert first.with_suffix(data).read_bytes() == second.with_suffix(data).read_bytes()
    assert without_plan(first) == without_plan(second)
    plans = [find_artifact(path).plan for path in (first, second)]
    assert plans[0].layers == plans[1].layers
    assert plans[0].sensitivity == plans[1].sensitivity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "0.01"), "budget 0.01"),
        (("-o", "out"), "neither a file that ends in .onnx (or .pt, .pt2) nor a folder"),
        (("--calibration", "gone.txt"), "gone.txt"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_code_1(
    model: str, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    outcome = compiled(model, tmp_path / "out.onnx", "-q", *options)
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert outcome.stderr.startswith("Error: ")
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ["model"],
        ["model", "--budget", "0.5"],
        ["model", "--budget", "0.5", "-o", "x.onnx", "--dtype", "int3"],
        ["model", "--budget", "0.5", "-o", "x.onnx", "--tokens", "1"],
        ["model", "--budget", "0.5", "-o", "x.onnx", "--cache", "int8", "--device", "cuda"],
        ["model", "--budget", "0.5", "-o", "x.onnx", "--cache", "int8", "--dtype", "float16"],
    ],
)
def test_wrong_usage_is_exit_code_2(options: list[str]) -> None:
    outcome = CliRunner().invoke(compile_command, options)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert "Usage:" in outcome.stderr


def test_debug_keeps_the_traceback(model: str, tmp_path: Path) -> None:
    outcome = compiled(model, tmp_path / "out.onnx", "--budget", "0.01", "--debug")
    assert isinstance(outcome.exception, AllocMoeError)


def test_force_replaces(model: str, tmp_path: Path) -> None:
    path, options = tmp_path / "out.onnx", ("--allocation", "uniform")
    assert compiled(model, path, *options).exit_code == 0
    assert compiled(model, path, *options).exit_code == 1
    assert compiled(model, path, *options, "--force").exit_code == 0


@pytest.mark.parametrize("command", [compile_command, profile_command, eval_command])
def test_help_has_an_example(command: Any) -> None:
    assert "\n  Example" in CliRunner().invoke(command, ["--help"]).stdout


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from alloc_moe.compiler.commands.alloc_compile import compile_command as c\n"
        "c.main(['--help'], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("torch", "onnx") else find(name),
    )
    with pytest.raises(
        AllocMoeError, match=r"needs torch, onnx, which .* Install alloc-moe\[compile\]"
    ):
        need_compile_extra()


def test_several_texts_hold_their_budgets_together(model: str, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    outcome = compiled(model, output, "--price-per", "sequence")
    assert outcome.exit_code == 0, outcome.stderr
    texts = ["The committee of the House " * 2, "Few experts are enough", "x"]
    options = ["--ep", "cpu", "--hold", "--json", "-q", "--max-new-tokens", "40"]

    def completions(*prompts: str) -> list[dict[str, Any]]:
        said = [part for prompt in prompts for part in ("--prompt", prompt)]
        run = CliRunner().invoke(run_command, [str(output), *options, *said])
        assert run.exit_code == 0, run.stderr
        found: list[dict[str, Any]] = json.loads(run.stdout)["completions"]
        return found

    together = completions(*texts)
    assert together == [completions(text)[0] for text in texts]
    assert len({completion["experts_per_token"] for completion in together}) == 3


@pytest.mark.parametrize(("cost", "unit"), [("bytes", "bytes"), ("latency", "ms")])
def test_a_budget_of_a_cost_is_kept_and_told(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cost: str, unit: str
) -> None:
    def steady(shape: ExpertShape, **_: object) -> LayerLatency:
        times = tuple(1.0 + k for k in range(shape.experts_per_token))
        return LayerLatency(times, (0.0,) * len(times))

    monkeypatch.setattr(latency, "measure_layer", steady)
    output = tmp_path / "out.onnx"
    outcome = compiled(model, output, "--cost", cost, "--cost-batch", "2", "--budget", "0.8")
    assert outcome.exit_code == 0, outcome.output
    plan = find_artifact(output).plan
    assert (plan.cost["kind"], plan.cost["unit"], plan.cost["batch"]) == (cost, unit, 2)
    assert plan.cost["planned"] <= plan.cost["limit"]
    assert plan.cost["limit"] == pytest.approx(0.8 * plan.cost["original"])
    assert plan.budget.activations == sum(layer.k for layer in plan.layers)
    assert f"{unit} in a decode step of batch 2" in outcome.output
    assert (tmp_path / "out.onnx.latency.json").exists() == (cost == "latency")


def test_a_cost_that_cannot_be_kept_is_said_before_profiling(model: str, tmp_path: Path) -> None:
    outcome = compiled(model, tmp_path / "out.onnx", "--cost", "bytes", "--budget", "0.1")
    assert outcome.exit_code == 1
    assert "but one expert in each MoE layer takes" in outcome.output
    assert list(tmp_path.iterdir()) == []


def test_a_cost_takes_no_count_of_activations(model: str, tmp_path: Path) -> None:
    outcome = compiled(model, tmp_path / "out.onnx", "--cost", "latency", "--budget", "4")
    assert outcome.exit_code == 1
    assert "which --cost latency can't count" in outcome.output


def test_latency_on_another_device_is_refused(model: str, tmp_path: Path) -> None:
    outcome = compiled(
        model, tmp_path / "out.onnx", "--cost", "latency", "--device", "cuda", "--budget", "0.8"
    )
    assert outcome.exit_code == 1
    assert "measured on the CPU, but the artifact is for cuda" in outcome.output


def test_a_compile_on_many_processes_is_wrong_usage(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = compiled(model, tmp_path / "out.onnx")
    assert outcome.exit_code == 2
    assert "alloc-compile works in one process." in outcome.stderr


def test_offloading_is_said_and_gives_the_same_artifact(model: str, tmp_path: Path) -> None:
    same = ("--correct", "gain", "--token-sizes")
    outcome = compiled(model, tmp_path / "offloaded.onnx", "--offload", "always", *same)
    assert outcome.exit_code == 0, outcome.stderr
    assert "As asked, decoder layers are read from disk when they run" in outcome.stderr
    assert "Profiling by fisher will take about " in outcome.stderr
    assert "Fitting token sizes will take about " in outcome.stderr
    assert compiled(model, tmp_path / "out.onnx", *same).exit_code == 0
    paths = [tmp_path / f"{name}.onnx" for name in ("offloaded", "out")]
    first, second = ((path.parent / f"{path.name}.data").read_bytes() for path in paths)
    assert first == second
    plans = [json.loads(find_artifact(path).plan.to_json()) for path in paths]
    for plan in plans:
        plan.pop("verify")
    assert plans[0] == plans[1]
