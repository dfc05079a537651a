"""Files of conversations, as text in the words of a chat template."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from alloc_moe.runtime.errors import ArtifactError
from alloc_moe.runtime.text import sources
from alloc_moe.runtime.text.chat import ChatTemplate
from alloc_moe.runtime.text.reading import TextError
from alloc_moe.runtime.text.sources import open_text

SOURCE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% if m.content is defined %}{{ m.content }}{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}\n"
    "{% endfor %}{% if tools is not none %}tools{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [{"role": "user", "content": "Hi <b>\u00e9\n"}, {"role": "assistant", "content": " Yes. "}]
SHARED = [{"from": "human", "value": "Hi <b>\u00e9\n"}, {"from": "gpt", "value": " Yes. "}]
TOLD = "<s>[user]Hi <b>\u00e9\n</s>\n[assistant] Yes. </s>\n"


def template(source: str = SOURCE) -> ChatTemplate:
    return ChatTemplate(source, name="a test", tokens=TOKENS)


def text_of(path: Path, *lines: Any, chat: ChatTemplate | None = None) -> str:
    """Return what is read of a file with these lines; what is no text is written as JSON."""
    written = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(written), "utf-8")
    with open_text(path, chat) as file:
        return file.read().decode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chats.jsonl"


@pytest.mark.parametrize(
    "messages",
    [
        TALK,
        [{"role": "system", "content": "Be brief."}, *TALK],
        [*TALK, {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "x": [1]}]}],
        [{"role": "assistant", "content": "Yes.", "thinking": "Is it?", "name": None}],
    ],
    ids=["plain", "system", "tool call", "reasoning"],
)
def test_a_conversation_is_what_transformers_makes_of_it(path: Path, messages: Any) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), **TOKENS
    )
    theirs.chat_template = SOURCE
    expected = theirs.apply_chat_template(messages, tokenize=False)
    assert text_of(path, {"messages": messages}, chat=template()) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": TALK},
        {"id": 7, "conversations": SHARED, "text": None},
        {"conversations": TALK},
        {
            "messages": [
                TALK[0]
                | {"content": [{"type": "text", "text": t} for t in ("Hi ", "<b>\u00e9\n")]},
                TALK[1],
            ]
        },
    ],
    ids=["messages", "ShareGPT", "messages by another name", "parts"],
)
def test_every_form_of_a_conversation_is_read(path: Path, fields: Any) -> None:
    assert text_of(path, fields, chat=template()) == TOLD


def test_texts_and_conversations_follow_each_other_in_one_file(path: Path) -> None:
    lines = [
        {"text": "One."},
        "",
        {"prompt": "Two", "completion": " and three."},
        {"messages": TALK},
    ]
    found = text_of(path, *lines, {"conversations": SHARED}, {"text": "Four."}, chat=template())
    assert found == f"One.\n\nTwo and three.\n\n{TOLD}{TOLD}Four."


def test_files_by_other_names_are_texts_themselves(tmp_path: Path) -> None:
    assert text_of(tmp_path / "a.json", {"text": "x"}) == '{"text": "x"}'
    assert text_of(tmp_path / "a.JSONL", "\ufeff" + '{"text": "x"}') == "x"


def test_an_empty_file_is_an_empty_text(path: Path) -> None:
    assert text_of(path, "", " ") == ""


def test_a_conversation_is_the_same_on_every_day(path: Path) -> None:
    dated = template("{{ strftime_now('%d %B %Y') }}")
    assert text_of(path, {"messages": TALK}, chat=dated) == "01 January 2026"


def test_long_files_are_read_piece_by_piece(path: Path) -> None:
    lines = [json.dumps({"text": f"{n} " + "\u4f60" * 100}) for n in range(20_000)]
    path.write_text("\n".join(lines))
    with open_text(path) as file:
        first = file.read(1 << 19)
        assert len(first) == 1 << 19
        whole = first + file.read()
    assert whole.decode() == "\n\n".join(json.loads(line)["text"] for line in lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", r"it is no JSON: .* at character 1\. Give objects such as"),
        ('["text"]', r"it is no JSON object\. Give objects such as"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", "a number that is too long"),
        ({"text": 7}, "text is 7, where a text of at most"),
        ({"text": "\ud800"}, "text is .*, where a text of at most"),
        ({"prompt": "Hi"}, "it has no messages, conversations, text, or prompt and completion, "
         "only prompt"),
        ({}, "or prompt and completion, only nothing"),
        ({"prompt": TALK, "completion": "x"}, "prompt is a list of 2 items, where a text"),
        ({"messages": []}, "messages is a list of 0 items, where a list of 1 to"),
        ({"messages": "Hi"}, "messages is 'Hi', where a list"),
        ({"messages": ["Hi"]}, r"messages\[0\] is 'Hi', where an object is expected"),
        ({"messages": [{"content": "Hi"}]}, r"it lacks messages\[0\]\.role"),
        ({"messages": [*TALK, {"role": "user"}]}, r"it lacks messages\[2\]\.content"),
        ({"messages": [{"role": "user", "content": 7}]}, r"messages\[0\]\.content is 7, where a"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            r"messages\[0\]\.content\[0\]\.type is 'image', where one of text is expected",
        ),
        ({"conversations": [{"from": "alice", "value": "Hi"}]}, r"\[0\]\.from is 'alice', where"),
        ({"conversations": [{"from": "gpt"}]}, r"it lacks conversations\[0\]\.value"),
    ],
)  # fmt: skip
def test_a_bad_line_is_refused_by_its_number(path: Path, line: Any, message: str) -> None:
    with pytest.raises(TextError, match=rf"^can't be read at line 3: .*{message}"):
        text_of(path, {"messages": TALK}, "", line, {"text": "x"}, chat=template())


def test_bytes_that_are_no_text_are_refused_by_their_line(path: Path) -> None:
    path.write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
    with open_text(path) as file, pytest.raises(TextError, match="line 2: it is not UTF-8 from"):
        file.read()


def test_a_line_that_is_too_long_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MOST_LINE", 1 << 20)
    with pytest.raises(TextError, match=r"at line 2: it is longer than 1 MiB\. Break it"):
        text_of(path, {"text": "x" * 1000}, {"text": "x" * (1 << 20)})


def test_conversations_need_a_template(path: Path) -> None:
    with pytest.raises(TextError, match=r"line 2: .* the model has no chat template\. Give texts"):
        text_of(path, {"text": "x"}, {"messages": TALK})


def test_a_template_that_refuses_a_conversation_says_which(path: Path) -> None:
    strict = template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TextError, match=r"line 1: .*these messages: roles must alternate"):
        text_of(path, {"messages": TALK}, chat=strict)
    half = template("{{ '\\ud800' }}")
    with pytest.raises(TextError, match="line 1: the text that the chat template makes of it"):
        text_of(path, {"messages": TALK}, chat=half)
    with pytest.raises(ArtifactError, match="The chat template of a test can't be read"):
        text_of(path, {"messages": TALK}, chat=template("{% if %}"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs")
def test_a_pipe_and_a_device_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TextError, match=r"is a pipe\. Write the text to a file first"):
        open_text(tmp_path / "pipe")
    with pytest.raises(TextError, match="is a device or a socket"):
        open_text(Path("/dev/zero"))
    with pytest.raises(IsADirectoryError):
        open_text(tmp_path)
