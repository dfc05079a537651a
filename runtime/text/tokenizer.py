"""Text <-> token ids: finds an artifact's tokenizer, and turns tokens into text as they come."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from alloc_moe.runtime.artifact.files import ArtifactFiles, TokenizerIdentity
from alloc_moe.runtime.artifact.plan import TOKENIZER_JSON_KEY
from alloc_moe.runtime.artifact.shapes import read_file
from alloc_moe.runtime.errors import AllocMoeError, ArtifactError, GenerationError

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
_MOST_BYTES = 256 << 20
_REPLACEMENT = "\ufffd"  # what half a UTF-8 character decodes to
_CONTEXT = 12  # tokens kept as context; a multiple of 2, 3 and 4, the bytes of a character


def load_tokenizer(files: ArtifactFiles, path: str | Path | None = None) -> Tokenizer:
    """Return an artifact's tokenizer: the one it carries, else the one that lies beside it.

    Another than the artifact was compiled with would give other tokens, so one that happens to lie
    there is not used.

    Args:
        files: The artifact.
        path: A tokenizer.json, or a folder with one, to use instead, whatever it is.

    Raises:
        ArtifactError: There is none, it can't be read, or it isn't the artifact's.
    """
    identity = files.tokenizer_identity()
    carried = files.onnx.metadata.get(TOKENIZER_JSON_KEY)
    if path is None and carried is not None:
        return _tokenizer(carried, f"the tokenizer in {files.graph}")
    found = files.find(TOKENIZER_FILE) if path is None else _given(Path(path))
    if found is None:
        raise ArtifactError(
            f"There is no {TOKENIZER_FILE} beside {files.graph}. Copy the model's there, or say "
            "where it is (--tokenizer)."
        )
    try:
        content = read_file(found, most=_MOST_BYTES)
        tokenizer = _tokenizer(str(content, "utf-8"), found)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{found} can't be read as a tokenizer: {error}.") from error
    if identity is None or _is_the_same(content, tokenizer, identity):
        return tokenizer
    if path is None:
        raise ArtifactError(
            f"{found} isn't the tokenizer that {files.graph} was compiled with. "
            "Put the model's own there, or say which one to use (--tokenizer)."
        )
    logger.warning("%s isn't the tokenizer that %s was compiled with.", found, files.graph)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, *, special: bool = True) -> list[int]:
    """Return the token ids of a text, with the start token if the tokenizer adds one.

    Raises:
        GenerationError: It is no text, as halves of characters aren't, or the tokenizer fails.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GenerationError(
            f"The text {text[:40]!r} has a character that UTF-8 can't write, at {error.start}. "
            "Give UTF-8 text."
        ) from error
    with _failures("The tokenizer can't encode the text", GenerationError):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special).ids
        return ids


def _tokenizer(content: str, name: str | Path) -> Tokenizer:
    with _failures(f"{name} can't be read as a tokenizer", ArtifactError):
        tokenizer = Tokenizer.from_str(content)
        tokenizer.no_truncation()  # these settings of training would cut or fill prompts
        tokenizer.no_padding()
        return tokenizer


@contextlib.contextmanager
def _failures(what: str, kind: type[AllocMoeError]) -> Iterator[None]:
    """Turn what the library raises, which is nothing specific, into an error of ours."""
    try:
        yield
    except Exception as error:
        raise kind(f"{what}: {error}.") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of its Rust code; no Exception
            raise
        raise kind(f"{what}: {error}.") from error


def _is_the_same(content: bytes, tokenizer: Tokenizer, identity: TokenizerIdentity) -> bool:
    if hashlib.sha256(content).hexdigest() in identity.files:
        return True
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest() == identity.sha256


def _given(path: Path) -> Path:
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise ArtifactError(f"There is no tokenizer at {file}.")
    return file


class TextStream:
    """Turns the tokens that follow a prompt into text, piece by piece.

    The pieces joined are the text of all tokens. None ends within a character: what may still
    become one is held back until later tokens complete it, or until `flush`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Decoders treat the start of a text specially (they strip a space, say), so the new tokens
        # are always decoded after some that came before.
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._told = len(self._decode())

    def push(self, token: int) -> str:
        """Return the text that one more token makes certain, which may be empty."""
        self._ids.append(token)
        text = self._decode()
        certain = len(text.rstrip(_REPLACEMENT))
        if certain < self._told:
            return ""
        piece = text[self._told : certain]
        self._told = certain
        if certain == len(text):
            self._forget()
        return piece

    def flush(self) -> str:
        """Return what was held back; bytes that are no character come as U+FFFD."""
        text = self._decode()
        piece, self._told = text[self._told :], len(text)
        return piece

    def _forget(self) -> None:
        """Drop tokens that are told, unless that would split a character."""
        ids = self._ids[-_CONTEXT:]
        text = str(self._tokenizer.decode(ids))
        if _REPLACEMENT not in text:
            self._ids, self._told = ids, len(text)

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids))
