"""New tokens -> the text of an answer, up to what ends it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from tokenizers import Tokenizer

from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.text.tokenizer import TextStream

Stopped = Literal["eos", "length", "stop_string"]
"""What ended an answer: an end token, the most tokens asked for, or a stop string."""

MOST_STOP_STRINGS = 16
_LONGEST_STOP_STRING = 256


class Answer:
    """The answer to one prompt, token by token.

    ``stopped`` is None until a token or a stop string has ended it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        eos_ids: Collection[int],
        stop_strings: Sequence[str] = (),
    ) -> None:
        self.stopped: Stopped | None = None
        self._stream = TextStream(tokenizer, prompt_ids)
        self._eos_ids = eos_ids
        self._stop_strings = stop_strings
        self._held = ""  # the beginning of a stop string, perhaps

    def push(self, token: int) -> str:
        """Return the text that one more token makes certain, which may be empty."""
        if token in self._eos_ids:
            self.stopped = "eos"
            return ""
        return self._certain(self._stream.push(token))

    def flush(self) -> str:
        """Return what was held back, once no token follows."""
        if self.stopped == "stop_string":
            return ""
        piece = self._certain(self._stream.flush())
        rest, self._held = self._held, ""
        return piece + rest

    def _certain(self, piece: str) -> str:
        text = self._held + piece
        found = [place for stop in self._stop_strings if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = "stop_string", ""
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def checked_stop_strings(stop_strings: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return stop strings as a tuple; one may be given alone.

    Raises:
        GenerationError: They are no texts, too many, empty or too long.
    """
    if stop_strings is None:
        return ()
    given = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    if len(given) > MOST_STOP_STRINGS:
        raise GenerationError(
            f"There are {len(given)} stop strings. Give at most {MOST_STOP_STRINGS}."
        )
    for text in given:
        if not isinstance(text, str) or not 0 < len(text) <= _LONGEST_STOP_STRING:
            raise GenerationError(
                f"{str(text)[:40]!r} is no stop string. Give texts of 1 to "
                f"{_LONGEST_STOP_STRING} characters."
            )
    return given


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text begin a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
