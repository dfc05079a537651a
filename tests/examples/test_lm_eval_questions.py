"""The questions in examples/lm_eval are those that its script makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "lm_eval"


@pytest.fixture
def script(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("lm_eval/make_questions")


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
