"""Tokenizers found, and text that comes in whole characters."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from alloc_moe.runtime.artifact.files import ArtifactFiles, find_artifact
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.errors import ArtifactError, GenerationError
from alloc_moe.runtime.text.tokenizer import TextStream, encode, load_tokenizer


@pytest.fixture(scope="module")
def byte_level(bundle: Path) -> Tokenizer:
    return load_tokenizer(find_artifact(bundle))


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A tokenizer of Llama's kind: words start with a mark, characters fall back to bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁world", "!"]
    tokenizer = Tokenizer(
        models.BPE({word: id for id, word in enumerate(words)}, [], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.push(token) for token in ids), stream.flush()]


@given(text=st.text(), prompt=st.text(max_size=5))
def test_pieces_make_up_the_text_and_are_whole_characters(
    byte_level: Tokenizer, text: str, prompt: str
) -> None:
    ids = byte_level.encode(text, add_special_tokens=False).ids
    parts = pieces(byte_level, ids, byte_level.encode(prompt).ids)
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts if "\ufffd" not in text)


@given(data=st.binary(max_size=60))
def test_bytes_that_are_no_text_come_as_replacement_characters(
    byte_level: Tokenizer, data: bytes
) -> None:
    assert "".join(pieces(byte_level, list(data), [])) == data.decode("utf-8", errors="replace")


def test_a_character_of_four_bytes_comes_at_its_last_byte(byte_level: Tokenizer) -> None:
    assert pieces(byte_level, list("a🙂b".encode()), []) == ["a", "", "", "", "🙂", "b", ""]


def test_long_texts_come_at_once_and_few_tokens_are_kept(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level)
    text = "漢字🙂é" * 100
    assert "".join(stream.push(byte) for byte in text.encode()) == text
    assert len(stream._ids) < 60


def test_the_space_before_the_first_new_word_is_kept(sentencepiece: Tokenizer) -> None:
    hello, world = sentencepiece.token_to_id("▁Hello"), sentencepiece.token_to_id("▁world")
    assert pieces(sentencepiece, [world, 259], [hello]) == [" world", "!", ""]
    assert pieces(sentencepiece, [world], []) == ["world", ""]


@pytest.mark.parametrize("text", ["€", "€€", "🙂é€" * 9])
def test_bytes_that_a_tokenizer_falls_back_to_come_as_characters(
    sentencepiece: Tokenizer, text: str
) -> None:
    ids = [1 + byte for byte in text.encode()]
    parts = pieces(sentencepiece, ids, [sentencepiece.token_to_id("▁Hello")])
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)


@pytest.fixture
def files(toy: Path, plan: AllocationPlan, tmp_path: Path) -> ArtifactFiles:
    """A bare artifact in a folder of its own, whose plan names a checkpoint folder."""
    (tmp_path / "artifact").mkdir()
    (tmp_path / "checkpoint").mkdir()
    graph = Path(shutil.copy(toy, tmp_path / "artifact"))
    plan = dataclasses.replace(plan, source=str(tmp_path / "checkpoint"))
    return dataclasses.replace(find_artifact(graph), plan=plan)


@pytest.fixture
def own(byte_level: Tokenizer) -> Tokenizer:
    """A copy, to be changed."""
    return Tokenizer.from_str(byte_level.to_str())


def with_metadata(files: ArtifactFiles, **metadata: object) -> ArtifactFiles:
    texts = {f"alloc_moe.{key}": json.dumps(value) for key, value in metadata.items()}
    onnx = dataclasses.replace(files.onnx, metadata={**files.onnx.metadata, **texts})
    return dataclasses.replace(files, onnx=onnx)


def identity_of(tokenizer: Tokenizer, *files: Path) -> dict[str, object]:
    def sha256(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    hashes = [sha256(file.read_bytes()) for file in files]
    return {"sha256": sha256(tokenizer.to_str().encode()), "files": hashes}


def test_the_tokenizer_is_beside_the_artifact(
    files: ArtifactFiles, own: Tokenizer, tmp_path: Path
) -> None:
    own.save(str(tmp_path / "tokenizer.json"))
    own.add_tokens(["more"])
    own.save(str(files.graph.parent / "tokenizer.json"))
    assert load_tokenizer(files).get_vocab_size() == 258
    assert load_tokenizer(files, tmp_path).get_vocab_size() == 257
    assert load_tokenizer(files, tmp_path / "tokenizer.json").get_vocab_size() == 257


def test_nothing_is_looked_for_where_the_plan_says_the_model_came_from(
    files: ArtifactFiles, own: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(files.plan.source)
    own.save(str(source / "tokenizer.json"))
    (source / "config.json").write_text('{"eos_token_id": 7, "max_position_embeddings": 9}')
    relative = dataclasses.replace(files, plan=dataclasses.replace(files.plan, source=source.name))
    monkeypatch.chdir(source.parent)
    for each in (files, relative):
        with pytest.raises(ArtifactError, match=r"beside .*out\.onnx\. Copy .*--tokenizer"):
            load_tokenizer(each)
        assert each.eos_ids() == frozenset()
        assert each.context_length() is None


def test_a_tokenizer_that_the_artifact_carries_goes_before_any_other(
    files: ArtifactFiles, own: Tokenizer
) -> None:
    carried = own.to_str()
    own.add_tokens(["more"])
    own.save(str(files.graph.parent / "tokenizer.json"))
    carrying = with_metadata(files, tokenizer_json=json.loads(carried))
    assert load_tokenizer(carrying).get_vocab_size() == 257
    assert load_tokenizer(carrying, files.graph.parent).get_vocab_size() == 258


def test_another_models_tokenizer_beside_the_artifact_is_not_used(
    files: ArtifactFiles,
    own: Tokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    beside = files.graph.parent / "tokenizer.json"
    own.save(str(beside), pretty=False)
    for identity in (identity_of(own), {**identity_of(Tokenizer(own.model), beside)}):
        known = with_metadata(files, tokenizer=identity)
        assert load_tokenizer(known).get_vocab_size() == 257
    own.save(str(beside), pretty=True)  # the same in other words
    known = with_metadata(files, tokenizer=identity_of(own))
    assert load_tokenizer(known).get_vocab_size() == 257
    own.add_tokens(["more"])
    own.save(str(beside))
    with pytest.raises(ArtifactError, match=r"isn't the tokenizer that .*out\.onnx.*--tokenizer"):
        load_tokenizer(known)
    assert not caplog.messages
    assert load_tokenizer(known, beside).get_vocab_size() == 258
    assert "isn't the tokenizer" in caplog.text


def test_what_the_artifact_says_of_its_end_goes_before_what_lies_beside_it(
    files: ArtifactFiles,
) -> None:
    (files.graph.parent / "config.json").write_text(
        '{"eos_token_id": 7, "max_position_embeddings": 9}'
    )
    assert (files.eos_ids(), files.context_length()) == ({7}, 9)
    bare = with_metadata(files, generation={"eos_token_id": [3, 4], "context_length": None})
    assert (bare.eos_ids(), bare.context_length()) == ({3, 4}, 9)
    bundle = dataclasses.replace(bare, graph=files.graph.rename(files.graph.parent / "model.onnx"))
    (files.graph.parent / "allocation.json").write_text("{}")
    assert bundle.eos_ids() == {7}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "generation",
            {"eos_token_id": "x"},
            "eos_token_id is 'x', where a whole number from 0 to",
        ),
        ("generation", [1], "it is no JSON object but a list of 1 items"),
        ("tokenizer", {"sha256": 5, "files": []}, "sha256 is 5, where a text"),
        ("tokenizer", {"sha256": "5"}, "it lacks files"),
    ],
)
def test_damaged_metadata_are_reported(
    files: ArtifactFiles, key: str, value: object, message: str
) -> None:
    damaged = with_metadata(files, **{key: value})
    with pytest.raises(ArtifactError, match=message):
        damaged.eos_ids() if key == "generation" else load_tokenizer(damaged)


def test_half_a_character_is_no_text(own: Tokenizer) -> None:
    with pytest.raises(GenerationError, match="UTF-8 can't write, at 1"):
        encode(own, "a\udce9")


def test_truncation_and_padding_of_training_are_off(files: ArtifactFiles, bundle: Path) -> None:
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(files.graph.parent / "tokenizer.json"))
    assert len(load_tokenizer(files).encode("four!").ids) == 5


def test_a_tokenizer_that_is_not_there_is_reported(files: ArtifactFiles, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no tokenizer at .*tokenizer\.json"):
        load_tokenizer(files, tmp_path)


def test_a_damaged_tokenizer_is_reported(files: ArtifactFiles) -> None:
    (files.graph.parent / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json can't be read as a tokenizer"):
        load_tokenizer(files)


@pytest.mark.parametrize(
    ("configurations", "expected"),
    [
        ({}, set()),
        (
            {
                "generation_config.json": {"eos_token_id": [3, 4]},
                "config.json": {"eos_token_id": 5},
            },
            {3, 4},
        ),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 5}}, {5}),
        (
            {
                "config.json": {"eos_token_id": None},
                "genai_config.json": {"model": {"eos_token_id": 6}},
            },
            {6},
        ),
    ],
)
def test_end_of_text_is_what_the_configuration_says(
    files: ArtifactFiles, configurations: dict[str, object], expected: set[int]
) -> None:
    for name, content in configurations.items():
        (files.graph.parent / name).write_text(json.dumps(content))
    assert files.eos_ids() == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", {"max_position_embeddings": 99}, 99),
        ("genai_config.json", {"model": {"context_length": 98}}, 98),
        ("config.json", {}, None),
    ],
)
def test_context_length_is_what_the_configuration_says(
    files: ArtifactFiles, name: str, content: object, expected: int | None
) -> None:
    (files.graph.parent / name).write_text(json.dumps(content))
    assert files.context_length() == expected


@pytest.mark.parametrize(("content", "message"), [("{", "as JSON"), ("[]", "no JSON object")])
def test_a_damaged_configuration_is_reported(
    files: ArtifactFiles, content: str, message: str
) -> None:
    (files.graph.parent / "config.json").write_text(content)
    with pytest.raises(ArtifactError, match=rf"config\.json .*{message}"):
        files.context_length()
