"""The tokenizer of an artifact: what identifies it, and for a graph that stands alone itself."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from alloc_moe.runtime.artifact.plan import TOKENIZER_JSON_KEY, TOKENIZER_KEY

if TYPE_CHECKING:
    from alloc_moe.compiler.model.checkpoint import Checkpoint

_MOST_CARRIED = 32 << 20  # more than any tokenizer has, and little beside the weights it is for


def tokenizer_metadata(checkpoint: Checkpoint, *, carried: bool) -> dict[str, str]:
    """Return what an artifact's metadata say of the tokenizer that its model was calibrated with.

    Args:
        checkpoint: The model's.
        carried: Put the tokenizer itself there too.
    """
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_truncation()  # as the runtime uses it
    tokenizer.no_padding()
    serialized: str = tokenizer.to_str()
    files = [tokenizer.to_str(pretty=True).encode()]  # what a bundle has
    if (own := checkpoint.folder / "tokenizer.json").is_file():
        files.append(own.read_bytes())
    identity = {
        "sha256": _sha256(serialized.encode()),
        "files": sorted({_sha256(content) for content in files}),
        "bos_token": _text(checkpoint.tokenizer.bos_token),
        "eos_token": _text(checkpoint.tokenizer.eos_token),
    }
    metadata = {TOKENIZER_KEY: json.dumps(identity)}
    if carried and len(serialized) <= _MOST_CARRIED:
        metadata[TOKENIZER_JSON_KEY] = serialized
    return metadata


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _text(token: object) -> str | None:
    return None if token is None else str(token)
