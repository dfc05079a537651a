"""Text files -> token ids, piece by piece: the ids are those of the whole text, the memory isn't.

A tokenizer takes a hundred times the memory of its text. So a long text is given to it in pieces
that overlap. Where two pieces overlap they must agree on a stretch of tokens, and there one is
continued by the other: what the end of a piece does to the tokens beside it is left out.
"""

from __future__ import annotations

import codecs
import hashlib
import io
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.errors import AllocMoeError

Encoded = tuple[Sequence[int], Sequence[tuple[int, int]] | None]
"""Token ids, and where each begins and ends in the text if the tokenizer tells."""

Encode = Callable[[str], Encoded]

MOST_BYTES = 128 << 20
_PIECE = 1 << 19  # characters
_OVERLAP = 1 << 12
_MOST_WITHOUT_PLACES = 16 << 20  # bytes, for tokenizers that can't be given pieces


class TextError(AllocMoeError):
    """A text can't be read. The message follows the text's name: ``is no file.``."""


@dataclass(frozen=True)
class TextIds:
    """What was read of a text.

    ``sha256`` is of the bytes read; ``cut`` says that there are more, which were wanted.
    """

    ids: NDArray[np.intc]
    sha256: str
    blank: bool
    cut: bool


def read_ids(
    file: BinaryIO,
    encode: Encode,
    *,
    most_tokens: int | None = None,
    most_bytes: int = MOST_BYTES,
    newlines: bool = False,
    digest_all: bool = False,
) -> TextIds:
    """Return the token ids of a text in UTF-8.

    Args:
        file: The text.
        encode: The tokenizer.
        most_tokens: Stop when there are so many, the first ones.
        most_bytes: Stop after so many bytes.
        newlines: Turn every kind of line end into a newline, as Python does with text files.
        digest_all: Let the digest be of the whole file, wherever the ids stop.

    Raises:
        TextError: It is no text, or can't be taken apart.
    """
    reader = _Reader(file, most_bytes, newlines=newlines)
    ids = array("i")
    for found in _encoded(reader, encode):
        ids.extend(found.tolist())
        if most_tokens is not None and len(ids) >= most_tokens:
            break
    sha256 = reader.digest_of_all() if digest_all else reader.digest.hexdigest()
    enough = most_tokens is not None and len(ids) >= most_tokens
    kept = np.frombuffer(ids, dtype=np.intc)[:most_tokens]  # a list would take ten times as much
    return TextIds(kept, sha256, blank=reader.blank, cut=reader.cut and not enough)


class _Reader:
    """Pieces of a text file, with what is known of them so far."""

    def __init__(self, file: BinaryIO, most_bytes: int, *, newlines: bool) -> None:
        self.digest = hashlib.sha256()
        self.blank, self.cut = True, False
        self.bytes = 0
        self._file, self._most_bytes = file, most_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._newlines = io.IncrementalNewlineDecoder(None, translate=True) if newlines else None

    def texts(self) -> Iterator[str]:
        while not self.cut:
            data = self._file.read(min(_PIECE, self._most_bytes - self.bytes + 1))
            if self.bytes + len(data) > self._most_bytes:
                data, self.cut = data[:-1], True
            self.digest.update(data)
            text = self._decoded(data, final=not data and not self.cut)
            self.bytes += len(data)
            if "\0" in text:
                raise TextError("has zero bytes, so it is no text. Give a text file in UTF-8.")
            self.blank = self.blank and not text.strip()
            if text:
                yield text
            if not data:
                return

    def _decoded(self, data: bytes, *, final: bool) -> str:
        start = self.bytes - len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, final=final)
        except UnicodeDecodeError as error:
            raise TextError(
                f"is not UTF-8: byte {start + error.start} is 0x{error.object[error.start]:02x}. "
                "Convert it to UTF-8."
            ) from error
        return text if self._newlines is None else self._newlines.decode(text, final=final)

    def digest_of_all(self) -> str:
        while data := self._file.read(_PIECE):
            self.digest.update(data)
        return self.digest.hexdigest()


@dataclass(frozen=True)
class _Piece:
    """Tokens of a piece of text that begins at `start`: ids, and where each begins and ends."""

    start: int
    text: str
    ids: NDArray[np.int64]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]

    def within(self, low: int, high: int) -> slice:
        """Return which tokens lie between two places."""
        [found] = np.nonzero((self.begins >= low) & (self.ends <= high))
        return slice(found[0], found[-1] + 1) if len(found) else slice(0, 0)


def _encoded(reader: _Reader, encode: Encode) -> Iterator[NDArray[np.int64]]:
    """Yield all token ids of a text, in parts."""
    texts = reader.texts()
    text = next(texts, "")
    more = next(texts, None)
    found, places = encode(text)
    if more is None:
        yield np.array(found, dtype=np.int64)
        return
    if places is None:
        yield _encoded_at_once(text + more, texts, encode)
        return
    piece, begin = _piece(0, text, found, places), 0
    while more is not None:
        following, end, start = _continued(piece, more, encode)
        yield piece.ids[begin:end]
        piece, begin = following, start
        more = next(texts, None)
    yield piece.ids[begin:]


def _encoded_at_once(text: str, texts: Iterator[str], encode: Encode) -> NDArray[np.int64]:
    parts = [text]
    size = len(text)
    for part in texts:
        parts.append(part)
        size += len(part)
        if size > _MOST_WITHOUT_PLACES:
            raise TextError(
                f"is longer than {_MOST_WITHOUT_PLACES >> 20} MiB, and this model's tokenizer "
                "can't be given pieces of it. Give its beginning."
            )
    return np.array(encode("".join(parts))[0], dtype=np.int64)


def _piece(start: int, text: str, ids: Sequence[int], places: Sequence[tuple[int, int]]) -> _Piece:
    bounds = np.array(places, dtype=np.int64).reshape(-1, 2) + start
    return _Piece(start, text, np.array(ids, dtype=np.int64), bounds[:, 0], bounds[:, 1])


def _continued(piece: _Piece, more: str, encode: Encode) -> tuple[_Piece, int, int]:
    """Return the next piece, and which of its tokens comes after which of the piece before."""
    overlap = _OVERLAP
    while overlap <= len(piece.text) // 2:
        start = piece.start + len(piece.text) - overlap
        text = piece.text[-overlap:] + more
        ids, places = encode(text)
        assert places is not None
        following = _piece(start, text, ids, places)
        middle = start + overlap // 4, start + 3 * overlap // 4
        old, new = piece.within(*middle), following.within(*middle)
        pairs = zip(
            (piece.ids, piece.begins, piece.ends),
            (following.ids, following.begins, following.ends),
            strict=True,
        )
        if old.stop and all(np.array_equal(a[old], b[new]) for a, b in pairs):
            return following, old.start, new.start
        overlap *= 2
    raise TextError(
        f"can't be read in pieces: around character {piece.start + len(piece.text)} there is no "
        "place to cut. Break its longest lines, or give its beginning."
    )
