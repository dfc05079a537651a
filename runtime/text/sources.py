"""A file of text or of conversations -> its text, as bytes to read.

A ``.jsonl`` file has a JSON object in every line that isn't blank:

- ``{"messages": [{"role", "content"}, ...]}``, or ``{"conversations": [{"from", "value"}, ...]}``
  as ShareGPT has it: a conversation, which the model's chat template turns into text;
- ``{"text"}`` or ``{"prompt", "completion"}``: a text, or one in two parts.

Any other file is the text itself. Rows of a dataset are such objects too.
"""

from __future__ import annotations

import io
import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from alloc_moe.runtime.artifact.shapes import (
    ShapeError,
    either,
    one_of,
    record,
    rows,
    string,
)
from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.text.reading import TextError

if TYPE_CHECKING:
    from alloc_moe.runtime.text.chat import ChatTemplate, Message

_MOST_LINE = 8 << 20  # bytes
_BUFFER = 1 << 19  # bytes
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
_SAME = ("system", "user", "assistant", "tool")  # what ShareGPT calls as everybody does
_TEXT = string(_MOST_LINE)
_SHARED = record({"from": one_of(*_ROLES, *_SAME), "value": _TEXT})
_NO_TEMPLATE = (
    "it is a conversation, but the model has no chat template. Give texts, or put the model's "
    "chat_template.jinja beside its tokenizer."
)
_FORM = 'Give objects such as {"messages": [{"role": "user", "content": "Hi"}]} or {"text": "Hi"}.'


@dataclass(frozen=True)
class Part:
    """The text of one object, and what follows it: nothing where a template ended it."""

    text: str
    after: str


def open_text(path: Path, template: ChatTemplate | None = None) -> BinaryIO:
    """Open a text file, or conversations as text.

    Args:
        path: The file.
        template: The model's, None if it has none. Needed once conversations are read.

    Returns:
        The text in UTF-8. Reading it raises TextError where a line can't be turned into text.

    Raises:
        OSError: It can't be opened.
        TextError: It is no regular file: reading a pipe or a device might never end.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a folder can't be opened anyway
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise TextError(f"is {kind}. Write the text to a file first.")
    file = path.open("rb")
    if not has_objects(path):
        return file
    return io.BufferedReader(_Joined(file, template), _BUFFER)


def has_objects(path: Path) -> bool:
    """Whether a file is one of objects by its name, not a text."""
    return path.suffix.lower() == ".jsonl"


def joined(parts: Iterable[Part]) -> Iterator[str]:
    """Yield the text of all parts, piece by piece."""
    before = ""
    for part in parts:
        yield before + part.text
        before = part.after


def part_of(fields: Mapping[str, Any], template: ChatTemplate | None) -> Part:
    """Return the text of an object.

    Args:
        fields: The object; fields of no known name are left out.
        template: The model's, None if it has none.

    Raises:
        ShapeError: It holds no text and no conversation.
        GenerationError: It is a conversation, which the template refuses, or there is none.
        ArtifactError: The template is no valid one.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if "text" in given:
        return Part(_TEXT(given["text"], "text"), "\n\n")
    for name in ("messages", "conversations"):
        if name in given:
            messages = _MESSAGES(given[name], name)
            if template is None:
                raise GenerationError(_NO_TEMPLATE)
            text = template.transcript(messages)
            return Part(_TEXT(text, "the text that the chat template makes of it"), "")
    if "prompt" in given and "completion" in given:
        return Part("".join(_TEXT(given[k], k) for k in ("prompt", "completion")), "\n\n")
    raise ShapeError(
        "it has no messages, conversations, text, or prompt and completion, only "
        f"{', '.join(given)[:200] or 'nothing'}"
    )


def _message(value: Any, where: str) -> Message:
    """Take a message of either kind; fields that only the template knows stay as they are."""
    if isinstance(value, dict):
        value = {name: each for name, each in value.items() if each is not None}
        if "from" in value and "role" not in value:
            shared = _SHARED(value, where)
            role = _ROLES.get(shared["from"], shared["from"])
            return {"role": role, "content": shared["value"]}
    found = record({"role": string()}, {"content": either(_TEXT, rows(_text_part))})(value, where)
    if "content" not in found and "tool_calls" not in value:
        raise ShapeError(f"it lacks {where}.content")
    if "content" in found:
        found["content"] = "".join(found["content"])  # a text stays what it is
    return {**value, **found}


def _text_part(value: Any, where: str) -> str:
    """Take a part of a message; images and other parts would be left out of the text."""
    record({"type": one_of("text")})(value, where)
    text: str = record({"text": _TEXT})(value, where)["text"]
    return text


_MESSAGES = rows(_message, least=1)


class _Joined(io.RawIOBase):
    """The text of a file of objects, as bytes."""

    def __init__(self, file: BinaryIO, template: ChatTemplate | None) -> None:
        self._file = file
        self._texts = joined(_parts(file, template))
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # what supports the buffer protocol
        while not self._left:
            text = next(self._texts, None)
            if text is None:
                return 0
            self._left = memoryview(text.encode())
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _parts(file: BinaryIO, template: ChatTemplate | None) -> Iterator[Part]:
    number = 0
    while line := file.readline(_MOST_LINE + 1):
        number += 1
        if len(line) > _MOST_LINE:
            raise TextError(
                f"can't be read at line {number}: it is longer than {_MOST_LINE >> 20} MiB. "
                "Break it into several objects."
            )
        if not line.strip():
            continue
        try:
            yield part_of(_object(line), template)
        except ShapeError as error:
            raise TextError(f"can't be read at line {number}: {error}. {_FORM}") from error
        except GenerationError as error:
            raise TextError(f"can't be read at line {number}: {error}") from error


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ShapeError(f"it is not UTF-8 from its byte {error.start} on") from error
    except json.JSONDecodeError as error:
        raise ShapeError(
            f"it is no JSON: {error.msg.removesuffix(' at')} at character {error.pos}"
        ) from error
    except (RecursionError, ValueError) as error:  # of numbers with very many digits
        raise ShapeError("it is nested too deeply, or has a number that is too long") from error
    if not isinstance(found, dict):
        raise ShapeError("it is no JSON object")
    return found
