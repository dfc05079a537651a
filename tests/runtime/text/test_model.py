"""Text in, text out."""

from __future__ import annotations

from pathlib import Path

import pytest

import alloc_moe.runtime as runtime
from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.text.model import TextModel, load


@pytest.fixture(scope="module")
def model(bundle: Path) -> TextModel:
    return load(bundle, ep="cpu")


def test_completions_equal_their_streamed_pieces(model: TextModel) -> None:
    pieces = ["", ""]

    def on_token(row: int, piece: str) -> None:
        pieces[row] += piece

    completions = model.generate(["The committee", "é"], max_new_tokens=20, on_token=on_token)
    assert [completion.text for completion in completions] == pieces
    assert completions[0].prompt == "The committee"
    assert completions[0].prompt_ids == tuple(b"The committee")
    assert completions[1].prompt_ids == tuple("é".encode())
    assert completions[0].text == bytes(completions[0].ids).decode(errors="replace")
    assert (completions[0].stopped, len(completions[0].ids)) == ("length", 20)


def test_the_end_token_is_in_the_ids_and_not_in_the_text(
    model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    [free] = model.generate(["The"], max_new_tokens=8)
    monkeypatch.setattr(model, "eos_ids", frozenset({free.ids[3]}))
    [ended] = model.generate(["The"], max_new_tokens=8)
    first = free.ids.index(free.ids[3])
    assert ended.ids == free.ids[: first + 1]
    assert ended.stopped == "eos"
    assert ended.text == bytes(free.ids[:first]).decode(errors="replace")


def test_sampling_is_repeatable(model: TextModel) -> None:
    sampling = runtime.Sampling(temperature=2.0, seed=5)
    first = model.generate(["The"], max_new_tokens=8, sampling=sampling)
    assert model.generate(["The"], max_new_tokens=8, sampling=sampling) == first


def test_an_unknown_end_of_text_is_warned_of(
    toy: Path, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(bundle, ep="cpu")
    assert not caplog.messages
    load(toy, tokenizer=bundle, ep="cpu")
    assert "nor a configuration beside it names the token that ends a text" in caplog.text


def test_an_empty_prompt_is_rejected(model: TextModel) -> None:
    with pytest.raises(GenerationError, match="Prompt 1 has no tokens"):
        model.generate([""])


def test_the_packages_names_are_those_of_its_modules() -> None:
    assert runtime.load is load
    assert all(hasattr(runtime, name) for name in runtime.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        runtime.nonsense  # noqa: B018
