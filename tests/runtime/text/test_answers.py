"""When an answer ends, and what of its text is told when."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.text.answers import Answer, checked_stop_strings
from alloc_moe.runtime.text.model import load


@pytest.fixture(scope="module")
def tokenizer(bundle: str) -> Tokenizer:
    return load(bundle, ep="cpu").tokenizer


def told(tokenizer: Tokenizer, text: bytes, *stops: str) -> tuple[list[str], Answer]:
    """Return the pieces that the bytes of a text give until it ends, and the answer."""
    answer = Answer(tokenizer, [], eos_ids={256}, stop_strings=stops)
    pieces = []
    for byte in text:
        pieces.append(answer.push(byte))
        if answer.stopped:
            break
    return [*pieces, answer.flush()], answer


def test_a_stop_string_ends_the_text_and_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    pieces, answer = told(tokenizer, b"one, two.STOP three", "STOP")
    assert "".join(pieces) == "one, two."
    assert answer.stopped == "stop_string"
    assert len(pieces) == len("one, two.STOP") + 1


def test_what_may_begin_a_stop_string_is_held_back_and_then_told(tokenizer: Tokenizer) -> None:
    pieces, answer = told(tokenizer, b"a<<b<", "<<c")
    assert pieces == ["a", "", "", "<<b", "", "<"]
    assert answer.stopped is None


def test_a_held_beginning_that_repeats_still_ends_the_text(tokenizer: Tokenizer) -> None:
    pieces, answer = told(tokenizer, b"aabaab!aabaac", "aabaac")
    assert "".join(pieces) == "aabaab!"
    assert answer.stopped == "stop_string"
    assert "".join(told(tokenizer, b"xaaab", "aab")[0]) == "xa"


def test_of_several_the_first_in_the_text_counts(tokenizer: Tokenizer) -> None:
    assert "".join(told(tokenizer, b"12345", "45", "34")[0]) == "12"


def test_a_stop_string_across_characters_of_several_bytes(tokenizer: Tokenizer) -> None:
    pieces, answer = told(tokenizer, "naïve é!".encode(), "ve é")
    assert "".join(pieces) == "naï"
    assert answer.stopped == "stop_string"


def test_the_end_token_gives_no_text(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, [], eos_ids={256}, stop_strings=["xy"])
    assert [answer.push(ord("x")), answer.push(256), answer.flush()] == ["", "", "x"]
    assert answer.stopped == "eos"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", ""], "'' is no stop string"),
        (["a" * 300], "is no stop string. Give texts of 1 to 256"),
        ([3], "'3' is no stop string"),
        (["a"] * 17, "There are 17 stop strings. Give at most 16"),
    ],
)
def test_wrong_stop_strings_are_rejected(given: list[str], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        checked_stop_strings(given)


def test_one_stop_string_may_be_given_alone() -> None:
    assert checked_stop_strings("ab") == ("ab",)
    assert checked_stop_strings(None) == ()
