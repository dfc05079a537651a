"""alloc-run, alloc-inspect and alloc-bench on the toy."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from alloc_moe.runtime.artifact.plan import PLAN_FILE, AllocationPlan
from alloc_moe.runtime.commands.alloc_bench import bench_command
from alloc_moe.runtime.commands.alloc_inspect import inspect_command
from alloc_moe.runtime.commands.alloc_run import run_command
from alloc_moe.runtime.text.model import load


def run(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(run_command, ["--ep", "cpu", *map(str, arguments)], input=stdin)


def text_of(bundle: Path, prompt: str, count: int) -> str:
    return load(bundle, ep="cpu").generate([prompt], max_new_tokens=count)[0].text


def test_one_prompt_is_streamed_with_its_continuation(bundle: Path) -> None:
    outcome = run(bundle, "--prompt", "The committee", "--max-new-tokens", "12")
    assert outcome.exit_code == 0
    assert outcome.stdout == f"The committee{text_of(bundle, 'The committee', 12)}\n"
    assert "prefill: 13 tokens in" in outcome.stderr
    assert "decode: 11 tokens in" in outcome.stderr


def test_several_prompts_are_labelled_and_equal_each_alone(bundle: Path) -> None:
    outcome = run(bundle, "--prompt", "The", "--prompt", "A longer one", "--max-new-tokens", "5")
    first, second = text_of(bundle, "The", 5), text_of(bundle, "A longer one", 5)
    assert outcome.stdout == f"[1/2] The{first}\n\n[2/2] A longer one{second}\n"


def test_prompts_come_from_files_and_stdin(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Ünï", encoding="utf-8")
    outcome = run(
        *(bundle, "--prompt-file", tmp_path / "prompt.txt", "--prompt-file", "-"),
        *("--max-new-tokens", "2", "--json"),
        stdin=b"from stdin",
    )
    prompts = [completion["prompt"] for completion in json.loads(outcome.stdout)["completions"]]
    assert prompts == ["Ünï", "from stdin"]


def test_a_prompt_file_that_is_no_text_is_reported(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.bin").write_bytes(b"\xff\xfe")
    outcome = run(bundle, "--prompt-file", tmp_path / "prompt.bin")
    assert outcome.exit_code == 1
    assert "prompt.bin is no UTF-8 text" in outcome.stderr


def test_json_has_texts_ids_and_timings(bundle: Path) -> None:
    outcome = run(bundle, "--prompt", "The", "--max-new-tokens", "5", "--json", "-q")
    data = json.loads(outcome.stdout)
    [completion] = data["completions"]
    assert completion["prompt_ids"] == list(b"The")
    assert len(completion["ids"]) == 5
    assert completion["text"] == text_of(bundle, "The", 5)
    assert completion["stopped"] == "length"
    assert set(data["seconds"]) == {"load", "prefill", "decode"}
    assert outcome.stderr == ""


def test_seed_and_temperature_reach_the_sampler(bundle: Path) -> None:
    def text(*options: str) -> str:
        return run(bundle, "--prompt", "The", "--max-new-tokens", "8", "-q", *options).stdout

    drawn = text("--temperature", "3", "--top-p", "0.9", "--seed", "4")
    assert drawn == text("--temperature", "3", "--top-p", "0.9", "--seed", "4")
    assert len({drawn, text(), text("--temperature", "3", "--seed", "5")}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", ""), "Prompt 1 has no tokens"),
        (("--prompt", "x", "--top-p", "0.5"), "no effect at temperature 0"),
        (("--prompt", "x", "--max-new-tokens", "64"), "model's context holds 64"),
        (("--prompt", "x", "--tokenizer", "nowhere"), "no tokenizer at nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(
    bundle: Path, options: tuple[str, ...], message: str
) -> None:
    outcome = run(bundle, *options)
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert outcome.stderr.startswith("Error: ")
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_no_prompt_is_wrong_usage(bundle: Path) -> None:
    outcome = run(bundle)
    assert outcome.exit_code == 2
    assert "Give a --prompt or a --prompt-file, or --chat." in outcome.stderr


def test_an_artifact_that_is_not_there_is_reported() -> None:
    outcome = run("gone.onnx", "--prompt", "x")
    assert outcome.exit_code == 1
    assert outcome.stderr == (
        "Error: There is no file gone.onnx. Check the path; alloc-compile writes such files.\n"
    )


def test_a_checkpoint_is_no_artifact_yet(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    outcome = run(str(tmp_path), "--prompt", "x")
    assert outcome.exit_code == 1
    assert f"is a checkpoint. Compile it first: alloc-compile {tmp_path} --b" in outcome.stderr


def test_inspect_shows_the_plan_without_the_weights(toy: Path, tmp_path: Path) -> None:
    shutil.copy(toy, tmp_path)
    outcome = CliRunner().invoke(inspect_command, [str(tmp_path / "out.onnx")])
    assert outcome.exit_code == 0
    assert "0.5 -> 4 of 8 activations per token (50.0%)" in outcome.stdout
    assert "metric kl, tokens 1024, calibration_sha256 000000000000..., seed 0" in outcome.stdout
    rows = [line for line in outcome.stdout.splitlines() if "model.layers." in line]
    assert len(rows) == 2
    assert "50%" in rows[0]


def test_inspect_shows_bits_where_they_differ(
    plan: AllocationPlan, make_toy: Callable[..., Path], tmp_path: Path
) -> None:
    for bits, shown in (((4, 8), True), ((4, 4), False)):
        pairs = zip(plan.layers, bits, strict=True)
        layers = tuple(dataclasses.replace(layer, bits=each) for layer, each in pairs)
        mixed = dataclasses.replace(plan, layers=layers)
        assert AllocationPlan.from_json(mixed.to_json()) == mixed
        path = make_toy(tmp_path / "out.onnx", plan=mixed.to_json())
        outcome = CliRunner().invoke(inspect_command, [str(path)])
        assert ("│ bits │" in outcome.stdout.replace("┃", "│")) == shown
    assert "bits" not in json.loads(plan.to_json())["layers"][0]


@pytest.mark.parametrize(
    ("metadata", "shown"),
    [
        ({"alloc_moe.step": "{}"}, "yes"),
        ({"alloc_moe.no_step": "it computes Tanh"}, "no: it computes Tanh"),
    ],
)
def test_inspect_says_whether_there_is_a_step_program(
    make_toy: Callable[..., Path], tmp_path: Path, metadata: dict[str, str], shown: str
) -> None:
    path = make_toy(tmp_path / "out.onnx")
    model = ir.load(path)
    model.metadata_props.update(metadata)
    ir.save(model, path)
    outcome = CliRunner().invoke(inspect_command, [str(path)])
    assert shown in outcome.stdout
    outcome = CliRunner().invoke(inspect_command, [str(path), "--json"])
    assert json.loads(outcome.stdout)["step_program"] == shown


def test_inspect_json_is_the_plan(bundle: Path, plan: AllocationPlan) -> None:
    outcome = CliRunner().invoke(inspect_command, [str(bundle), "--json"])
    data = json.loads(outcome.stdout)
    assert data.pop("artifact") == str(bundle / "model.onnx")
    assert data == json.loads((bundle / PLAN_FILE).read_text()) == json.loads(plan.to_json())


SMALL = ("--prompt-tokens", "9", "--past", "5", "--new-tokens", "3", "--runs", "3", "--ep", "cpu")


def test_bench_compares_with_the_first_artifact(toy: Path, bundle: Path) -> None:
    outcome = CliRunner().invoke(bench_command, [str(toy), str(bundle), *SMALL, "--json"])
    assert outcome.exit_code == 0
    data = json.loads(outcome.stdout)
    assert data["workload"] == {
        "prompt_tokens": 9, "past": 5, "new_tokens": 3, "runs": 3, "seed": 0,
    }  # fmt: skip
    assert data["device"] == "cpu"
    first, second = data["artifacts"]
    assert (first["artifact"], second["artifact"]) == (str(toy), str(bundle))
    for kind in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        assert first[kind]["ratio_to_first"] == 1
        assert len(second[kind]["runs"]) == 3
        assert second[kind]["min"] <= second[kind]["median"] <= second[kind]["max"]


def test_options_of_the_session_are_passed_on_and_printed(bundle: Path) -> None:
    spinning = "session.intra_op.allow_spinning"
    options = ["--session", "enable_mem_pattern=0", "--session", f"{spinning}=0"]
    outcome = CliRunner().invoke(bench_command, [str(bundle), *SMALL, *options])
    assert outcome.exit_code == 0, outcome.output
    assert f"enable_mem_pattern 0, {spinning} 0" in " ".join(outcome.stdout.split())
    assert run(bundle, "--prompt", "a", "--max-new-tokens", 1, *options).exit_code == 0


@pytest.mark.parametrize(
    ("entry", "code", "message"),
    [("arena", 2, "'arena' is not NAME=VALUE"), ("arena=0", 1, "no switch or number 'arena'")],
)
def test_wrong_options_of_the_session_are_said(
    toy: Path, entry: str, code: int, message: str
) -> None:
    outcome = run(toy, "--prompt", "a", "--session", entry)
    assert outcome.exit_code == code
    assert message in outcome.stderr


def test_bench_prints_a_table_with_the_machine(toy: Path) -> None:
    outcome = CliRunner().invoke(bench_command, [str(toy), *SMALL])
    assert "1.00x" in outcome.stdout
    assert "logical CPUs" in outcome.stdout
    assert "Measuring: 4 runs in" in outcome.stderr


@pytest.mark.parametrize("command", [run_command, inspect_command, bench_command])
def test_help_has_an_example(command: object) -> None:
    assert "\n  Example" in CliRunner().invoke(command, ["--help"]).stdout
