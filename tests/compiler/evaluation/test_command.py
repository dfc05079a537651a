"""alloc-lm-eval, and what it loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from alloc_moe.compiler.commands.alloc_lm_eval import NAME

if TYPE_CHECKING:
    pass

ROOT = Path(__file__).parents[3]


def run_command(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run alloc-lm-eval from the root of the repository, without the harness's own tasks."""
    code = (
        "import functools, lm_eval.tasks as tasks\n"
        "tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)\n"
        "from alloc_moe.compiler.commands.alloc_lm_eval import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "--model", NAME, *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_runs_the_tasks_of_the_examples(artifact: Path, tmp_path: Path) -> None:
    run = run_command(
        *("--model_args", f"artifact={artifact},threads=1", "--limit", "4"),
        *("--include_path", "examples/lm_eval", "--tasks", "tiny_next_word,tiny_last_word"),
        cache=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    table = [[cell.strip() for cell in row.split("|")] for row in run.stdout.splitlines()]
    assert {row[1]: row[5] for row in table if len(row) > 5 and row[1].startswith("tiny")} == {
        "tiny_last_word": "exact_match",
        "tiny_next_word": "acc",
    }


def test_the_command_shows_our_errors_plainly(tmp_path: Path) -> None:
    run = run_command(
        *("--model_args", "artifact=none.onnx", "--tasks", "tiny_next_word"),
        *("--include_path", "examples/lm_eval"),
        cache=tmp_path,
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("Error: There is no file none.onnx. Check the")
    assert "Traceback" not in run.stderr


def test_a_task_that_is_unknown_is_refused_plainly(tmp_path: Path) -> None:
    run = run_command(
        *("--model_args", "artifact=none.onnx", "--tasks", "no_such_task"),
        *("--include_path", "examples/lm_eval"),
        cache=tmp_path,
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(
        "Error: lm-evaluation-harness can't do that: Task"
    )
    assert "no_such_task" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_artifacts_are_evaluated_without_loading_torch(artifact: Path) -> None:
    code = (
        "import sys\n"
        "from alloc_moe.compiler.evaluation.harness import AllocMoeLM\n"
        "from lm_eval.api.instance import Instance\n"
        f"lm = AllocMoeLM(artifact={str(artifact)!r}, threads=1)\n"
        "lm.loglikelihood([Instance('loglikelihood', {}, ('a', 'b'), 0)], disable_tqdm=True)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
