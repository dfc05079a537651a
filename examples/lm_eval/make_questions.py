"""Writes the questions of the tasks in this folder from the tiny model's texts, always the same.

next_word.jsonl: which of four words comes next? All four follow the same word in the text.
last_word.jsonl: the last word of a frequent phrase. Phrases are found in calibration.txt, questions
in heldout.txt; the tiny model was trained on neither.

    python examples/lm_eval/make_questions.py
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
TEXTS = HERE.parent / "tiny-moe"
SEED = 0
CONTEXT = 240  # characters, from the start of a word
LETTERS = 4  # of an answer, at the least

QUESTIONS = 1000  # of next_word
WRONG = 3

PHRASE = 3  # words, the answer included
SEEN = 3  # times a phrase's beginning occurs in calibration.txt, at the least
SHARE = 0.5  # of those, at the least, go on with the same word
PER_ANSWER = 10  # questions with the same answer, so that no answer is a good guess


def main() -> None:
    """Write both files beside this script."""
    heldout, calibration = (
        (TEXTS / name).read_text("utf-8").split("<|endoftext|>")
        for name in ("heldout.txt", "calibration.txt")
    )
    for name, questions in (
        ("next_word", next_word(heldout)),
        ("last_word", last_word(heldout, phrases(calibration))),
    ):
        lines = [json.dumps(question, ensure_ascii=False) for question in questions]
        (HERE / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def next_word(documents: list[str]) -> list[dict[str, Any]]:
    """Return questions ``{"context", "choices", "answer"}``, the answer as an index."""
    random = Random(SEED)
    followers: dict[str, set[str]] = defaultdict(set)
    places = []
    for document in documents:
        for start, (before, word) in word_groups(document, 2):
            followers[before].add(word)
            places.append((document, start, before, word))
    random.shuffle(places)
    questions: list[dict[str, Any]] = []
    for document, start, before, word in places:
        context = context_before(document, start)
        wrong = sorted(followers[before] - {word})
        if context and len(wrong) >= WRONG and len(questions) < QUESTIONS:
            choices = [word, *random.sample(wrong, WRONG)]
            random.shuffle(choices)
            questions.append(
                {"context": context, "choices": choices, "answer": choices.index(word)}
            )
    return questions


def last_word(documents: list[str], known: dict[tuple[str, ...], str]) -> list[dict[str, str]]:
    """Return questions ``{"context", "answer"}`` where a known phrase stands in the documents."""
    random = Random(SEED)
    places = [
        (context, words[-1])
        for document in documents
        for start, words in word_groups(document, PHRASE)
        if known.get(words[:-1]) == words[-1] and (context := context_before(document, start))
    ]
    random.shuffle(places)
    used: Counter[str] = Counter()
    questions = []
    for context, answer in places:
        used[answer] += 1
        if used[answer] <= PER_ANSWER:
            questions.append({"context": context, "answer": answer})
    return questions


def phrases(documents: list[str]) -> dict[tuple[str, ...], str]:
    """Return the usual last word of each phrase, by its words before."""
    ends: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for document in documents:
        for _, words in word_groups(document, PHRASE):
            ends[words[:-1]][words[-1]] += 1
    usual = {beginning: counts.most_common(1)[0] for beginning, counts in ends.items()}
    return {
        beginning: word
        for beginning, (word, count) in usual.items()
        if ends[beginning].total() >= SEEN and count >= SHARE * ends[beginning].total()
    }


def word_groups(document: str, size: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield words in a row, with single spaces between, and where the last one starts."""
    words = list(re.finditer(r"[A-Za-z]+", document))
    for last in range(size - 1, len(words)):
        group = words[last - size + 1 : last + 1]
        gaps = {document[a.end() : b.start()] for a, b in pairwise(group)}
        if gaps == {" "} and len(group[-1][0]) >= LETTERS:
            yield group[-1].start(), tuple(word[0] for word in group)


def context_before(document: str, end: int) -> str:
    """Return about `CONTEXT` characters before a place, from the start of a word; else nothing."""
    start = re.compile(r"\s\S").search(document, max(end - CONTEXT, 0))
    if end < CONTEXT or start is None:
        return ""
    return document[start.end() - 1 : end].rstrip()


if __name__ == "__main__":
    main()
