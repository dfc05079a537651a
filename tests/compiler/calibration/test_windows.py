from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer, OlmoeConfig

from alloc_moe.compiler import compile
from alloc_moe.compiler.calibration import windows
from alloc_moe.compiler.calibration.windows import CalibrationSet, load_calibration
from alloc_moe.compiler.errors import CalibrationError
from alloc_moe.runtime.text import reading
from alloc_moe.runtime.text.reading import read_ids

TINY_MOE = Path(__file__).parents[3] / "examples" / "tiny-moe"
BUILT_IN = Path(windows.__file__).with_name("built_in.txt")
Load = Callable[..., CalibrationSet]


class ByteTokenizer:
    """One token per byte."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_special_tokens": False, "verbose": False}
        return {"input_ids": list(text.encode())}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(32, 127)) * 40)  # 3800 tokens
    return path


def load(
    source: str | Path, *, tokens: int = 1024, seed: int = 0, **settings: int
) -> CalibrationSet:
    config = OlmoeConfig(**{"vocab_size": 256, "max_position_embeddings": 2048} | settings)
    return load_calibration(source, ByteTokenizer(), config, tokens=tokens, seed=seed)  # type: ignore[arg-type]


def test_windows_are_whole_pieces_of_the_text(text: Path) -> None:
    calibration = load(text)
    pieces = np.frombuffer(text.read_bytes(), np.uint8)[: 7 * 512].reshape(7, 512).tolist()
    assert calibration.ids.shape == (2, 512)
    assert calibration.ids.dtype == np.int64
    assert all(window in pieces for window in calibration.ids.tolist())
    assert calibration.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (calibration.tokens, calibration.sequence_length) == (1024, 512)
    assert (calibration.seed, calibration.name) == (0, str(text))


def test_windows_do_not_overlap(text: Path) -> None:
    starts = load(text, tokens=3584).ids[:, 0].tolist()
    assert sorted(starts) == sorted(text.read_bytes()[: 7 * 512 : 512])


def test_further_windows_follow_those_asked_for(text: Path) -> None:
    text.write_bytes(text.read_bytes() * 2)  # 14 windows of 512
    few = load(text, tokens=512)
    assert few.further is not None
    assert (few.ids.shape, few.further.shape) == ((1, 512), (7, 512))
    many = load(text, tokens=3000)
    assert many.further is not None
    assert np.array_equal(many.all_ids, np.concatenate([many.ids, many.further]))
    assert len({window.tobytes() for window in many.all_ids}) == 14  # the text has no others
    assert np.array_equal(few.all_ids, many.all_ids[:8])


def test_a_text_that_is_used_up_has_no_further_windows(text: Path) -> None:
    drawn = load(text, tokens=3584)
    assert drawn.further is None
    assert drawn.all_ids is drawn.ids


def test_the_seed_decides_which_windows_are_drawn(text: Path) -> None:
    draws = [load(text, seed=seed).ids.tolist() for seed in range(8)]
    assert draws[3] == load(text, seed=3).ids.tolist()
    assert any(draw != draws[0] for draw in draws)


@pytest.mark.parametrize(
    ("tokens", "positions", "shape"),
    [(1000, 2048, (2, 512)), (700, 2048, (1, 512)), (100, 2048, (1, 100)), (1024, 128, (8, 128))],
)
def test_windows_fit_the_model_and_the_tokens_asked_for(
    text: Path, tokens: int, positions: int, shape: tuple[int, int]
) -> None:
    assert load(text, tokens=tokens, max_position_embeddings=positions).ids.shape == shape


def test_a_short_text_is_used_whole_and_reported(
    text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "alloc_moe"):
        calibration = load(text, tokens=8192)
    assert calibration.tokens == calibration.ids.size == 3584
    assert "has 3800 tokens, fewer than the 8192 asked for; 3584 are used." in caplog.text


def test_a_text_of_one_sentence_is_one_window(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("The committee met.")
    assert load(path).ids.tolist() == [list(b"The committee met.")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"x", r"has 1 token; at least 2 are needed"),
        (b"abc\xff", "is not UTF-8: byte 3 is 0xff. Convert it"),
        (b"\x7fELF\x00\x00", "has zero bytes, so it is no text"),
    ],
)
def test_useless_texts_are_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load(path)


def test_a_missing_file_and_a_folder_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"missing\.txt can't be read: No such file"):
        load(tmp_path / "missing.txt")
    with pytest.raises(CalibrationError, match="can't be read: Is a directory"):
        load(tmp_path)
    with pytest.raises(CalibrationError, match=r"folder/missing\.txt can't be read"):
        load("folder/missing.txt")


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs")
@pytest.mark.parametrize("source", ["folder/missing.txt", "none.jsonl"])
def test_a_missing_file_is_reported_before_a_model_is_loaded(source: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=f"{source} can't be read: No such file"):
        compile("no/model", calibration=str(tmp_path / source), output=tmp_path / "out.onnx")


def test_a_pipe_is_rejected_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "text.txt")
    with pytest.raises(CalibrationError, match=r"text\.txt is a pipe\. Write the text to a file"):
        load(tmp_path / "text.txt")


GOLDEN = {
    TINY_MOE / "calibration.txt": ("c7e1d951238b", "37983c3ab2282040"),
    TINY_MOE / "heldout.txt": ("5fa490c0e1ce", "0291069e57fcb12c"),
    BUILT_IN: ("cf03a38b5de3", "1939df40f8a2ba88"),
}


@pytest.mark.parametrize("piece", [None, 1 << 15])
@pytest.mark.parametrize(("path", "digests"), GOLDEN.items(), ids=lambda value: str(value)[-9:])
def test_bundled_texts_give_the_windows_that_they_always_gave(
    monkeypatch: pytest.MonkeyPatch, path: Path, digests: tuple[str, str], piece: int | None
) -> None:
    if piece:
        monkeypatch.setattr(reading, "_PIECE", piece)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    config = AutoConfig.from_pretrained(TINY_MOE)
    found = load_calibration(path, tokenizer, config, tokens=8192, seed=0)
    assert found.ids.dtype == np.int64
    ids = hashlib.sha256(found.ids.tobytes()).hexdigest()
    assert (found.sha256[:12], ids[:16]) == digests


def test_of_a_text_that_is_too_long_the_beginning_is_used_and_that_is_said(
    text: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(windows, "read_ids", functools.partial(read_ids, most_bytes=2048))
    with caplog.at_level(logging.WARNING, "alloc_moe"):
        assert load(text, tokens=2048).tokens == 2048
    assert "text.txt is longer than 128 MiB, from which windows are drawn" in caplog.text


def test_too_few_tokens_asked_for_are_rejected(text: Path) -> None:
    with pytest.raises(CalibrationError, match="at least 2 tokens, not 1"):
        load(text, tokens=1)


def test_the_tokenizer_of_another_model_is_rejected(text: Path) -> None:
    with pytest.raises(
        CalibrationError, match="gives token 126, but the model's vocabulary has 100"
    ):
        load(text, vocab_size=100)


def test_a_dataset_needs_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"no file owner/name, .* pip install datasets"):
        load("owner/name")


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((*args, options))
        return rows()

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_dataset_is_read_only_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def rows() -> Any:
        for index in range(1000):
            taken.append(index)
            yield {"text": f"row {index} " * 20}

    calls = fake_datasets(monkeypatch, rows)
    calibration = load("owner/name:config", tokens=64)
    assert calibration.ids.shape == (1, 64)
    assert calls == [("owner/name", "config", {"split": "train", "streaming": True})]
    assert len(taken) < 20


def test_a_dataset_without_text_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, lambda: iter([{"label": 1, "sentence": "x"}]))
    message = "Row 1 of the dataset owner/name is no text: .* only label, sentence. Write texts"
    with pytest.raises(CalibrationError, match=message):
        load("owner/name")


class ChatTokenizer(ByteTokenizer):
    """One with a chat template."""

    chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    special_tokens_map = {"bos_token": "<s>"}  # noqa: RUF012  # as transformers has it


def chat_windows(source: str | Path) -> bytes:
    """Return the text of all windows, which is that of one."""
    config = OlmoeConfig(vocab_size=256)
    found = load_calibration(source, ChatTokenizer(), config, tokens=64, seed=0)  # type: ignore[arg-type]
    [window] = found.ids.tolist()
    return bytes(window)


TALK = {"messages": [{"role": "user", "content": "Hi"}]}


def test_conversations_in_a_dataset_are_told_by_the_template(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_datasets(monkeypatch, lambda: iter([TALK, {"text": "One."}, {"text": "Two."}]))
    assert chat_windows("owner/name") == b"<s>user: Hi\nOne.\n\nTwo."


def test_conversations_in_a_file_are_told_by_the_template(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(TALK))
    assert chat_windows(path) == b"<s>user: Hi\n"
    with pytest.raises(
        CalibrationError, match=r"text .*chats\.jsonl can't be read at line 1: it is"
    ):
        load(path)  # without a template
    path.write_text("{")
    with pytest.raises(
        CalibrationError, match=r"chats\.jsonl can't be read at line 1: it is no JSON"
    ):
        load(path)
    path.write_text("")
    with pytest.raises(CalibrationError, match=r"chats\.jsonl is empty"):
        load(path)
    with pytest.raises(CalibrationError, match=r"folder/none\.jsonl can't be read: No such file"):
        load("folder/none.jsonl")


def test_the_template_for_conversations_without_tools_is_taken() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    assert windows.chat_template(tokenizer) is None
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "no"}
    found = windows.chat_template(tokenizer)
    assert found is not None
    expected = tokenizer.apply_chat_template(TALK["messages"], tokenize=False)
    assert found.transcript(TALK["messages"]) == expected == "Hi"


def test_a_dataset_that_does_not_exist_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        raise FileNotFoundError("Dataset 'owner/name' doesn't exist on the Hub")

    fake_datasets(monkeypatch, rows)
    with pytest.raises(
        CalibrationError, match="gave no such dataset: Dataset 'owner/name' doesn't"
    ):
        load("owner/name")
