"""Text <-> token ids: finds an artifact's tokenizer, and turns tokens into text as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from alloc_moe.runtime.artifact.files import ArtifactFiles
from alloc_moe.runtime.errors import ArtifactError

TOKENIZER_FILE = "tokenizer.json"
_REPLACEMENT = "\ufffd"  # what half a UTF-8 character decodes to
_CONTEXT = 12  # tokens kept as context; a multiple of 2, 3 and 4, the bytes of a character


def load_tokenizer(files: ArtifactFiles, path: str | Path | None = None) -> Tokenizer:
    """Return an artifact's tokenizer.

    Args:
        files: The artifact; the tokenizer is looked for beside it, then where its plan says that
            the model came from.
        path: A tokenizer.json, or a folder with one, to use instead.

    Raises:
        ArtifactError: There is none, or it can't be read.
    """
    found = files.find(TOKENIZER_FILE) if path is None else _given(Path(path))
    if found is None:
        raise ArtifactError(
            f"There is no {TOKENIZER_FILE} beside {files.graph}, nor in {files.plan.source}, where "
            "the model came from. Copy it there or say where it is (--tokenizer)."
        )
    try:
        tokenizer = Tokenizer.from_file(str(found))
    except Exception as error:  # the library raises nothing more specific
        raise ArtifactError(f"{found} can't be read as a tokenizer: {error}.") from error
    tokenizer.no_truncation()  # these settings of training would cut or fill prompts
    tokenizer.no_padding()
    return tokenizer


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
