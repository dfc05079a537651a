"""The questions in examples/lm_eval are those that its script makes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "lm_eval"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("questions", FOLDER / "make_questions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_makes_these_questions_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "HERE", tmp_path)
    script.main()
    for name in ("next_word.jsonl", "last_word.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_the_right_word_stands_in_the_held_out_text(script: ModuleType) -> None:
    heldout = (script.TEXTS / "heldout.txt").read_text("utf-8")
    for line in (FOLDER / "next_word.jsonl").read_text("utf-8").splitlines():
        question = json.loads(line)
        right = question["choices"][question["answer"]]
        assert f"{question['context']} {right}" in heldout
        assert len(set(question["choices"])) == len(question["choices"]) == 4


def test_no_answer_is_a_good_guess() -> None:
    lines = (FOLDER / "last_word.jsonl").read_text("utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert max(answers.count(answer) for answer in answers) <= 0.06 * len(answers)
