"""alloc-profile on a small model: options in, exit code out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner, Result

from alloc_moe.compiler.commands.alloc_compile import compile_command
from alloc_moe.compiler.commands.alloc_profile import profile_command


def compiled(model: str, output: Path, *options: str | Path) -> Result:
    arguments = [model, "--budget", "0.5", "--tokens", "256", "-o", str(output)]
    return CliRunner().invoke(compile_command, [*arguments, *map(str, options)])


def test_a_profile_made_before_is_taken(model: str, tmp_path: Path) -> None:
    options = [model, "-o", str(tmp_path / "p.json"), "--tokens", "256"]
    outcome = CliRunner().invoke(profile_command, [*options, "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    data = json.loads(outcome.stdout)
    assert (data["profile"], data["metric"]) == (str(tmp_path / "p.json"), "fisher")
    before = (tmp_path / "p.json").read_bytes()
    outcome = compiled(model, tmp_path / "out.onnx", "--profile", tmp_path / "p.json")
    assert "Profiling" not in outcome.stderr
    assert (tmp_path / "p.json").read_bytes() == before
    again = CliRunner().invoke(profile_command, options)
    assert again.stdout.startswith(
        f"Wrote {tmp_path / 'p.json'}: fisher of 3 MoE layers on 256 tokens"
    )


def test_a_profile_of_rounded_weights_is_for_artifacts_of_that_type(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = str(checkpoint("olmoe"))
    options = [model, "-o", str(tmp_path / "p.json"), "--tokens", "256", "--dtype", "int4"]
    outcome = CliRunner().invoke(profile_command, options)
    assert outcome.exit_code == 0, outcome.stderr
    given = ("--profile", tmp_path / "p.json")
    outcome = compiled(model, tmp_path / "out.onnx", *given, "--dtype", "int4")
    assert outcome.exit_code == 0, outcome.stderr
    assert "Profiling" not in outcome.stderr
    outcome = compiled(model, tmp_path / "float.onnx", *given)
    assert outcome.exit_code == 1
    assert "the model" in outcome.stderr


def test_a_profile_of_another_redistribution_is_refused(model: str, tmp_path: Path) -> None:
    options = [model, "-o", str(tmp_path / "p.json"), "--tokens", "256", "--sensitivity", "fisher"]
    assert CliRunner().invoke(profile_command, [*options, "--redistribute", "none"]).exit_code == 0
    options = ["--profile", tmp_path / "p.json", "--sensitivity", "fisher"]
    outcome = compiled(model, tmp_path / "out.onnx", *options, "--redistribute", "batch")
    assert outcome.exit_code == 1
    assert "the redistribution (there none, now sequence) changed" in " ".join(
        outcome.stderr.split()
    )


def test_a_profile_with_another_correction_is_refused(model: str, tmp_path: Path) -> None:
    common = ["--tokens", "256", "--redistribute", "sequence", "--sensitivity", "output"]
    options = [model, "-o", str(tmp_path / "p.json"), *common]
    assert CliRunner().invoke(profile_command, [*options, "--correct", "gain"]).exit_code == 0
    assert json.loads((tmp_path / "p.json").read_text())["correction"] == "gain"
    outcome = CliRunner().invoke(profile_command, options)
    assert outcome.exit_code == 1
    assert "the correction (there gain, now affine) changed" in " ".join(outcome.stderr.split())
