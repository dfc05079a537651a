"""The held-out text that a sweep scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alloc_moe.compiler.calibration.windows import encoder, open_source
from alloc_moe.compiler.errors import SweepError
from alloc_moe.runtime.text.reading import MOST_BYTES, TextError, read_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class HeldOut:
    """Text that nothing was fitted to, as the model's token ids [tokens]."""

    name: str
    sha256: str
    ids: NDArray[np.intc]


def read_held_out(
    path: Path, most_tokens: int | None, tokenizer: PreTrainedTokenizerBase
) -> HeldOut:
    """Return the text of a file, of which `most_tokens` are taken.

    Raises:
        SweepError: It can't be read, or is too long.
    """
    try:
        with open_source(path, tokenizer) as file:
            encode = encoder(tokenizer)
            text = read_ids(file, encode, most_tokens=most_tokens, digest_all=True)
    except OSError as error:
        raise SweepError(
            f"The text {path} can't be read: {error.strerror}. Give a UTF-8 file."
        ) from error
    except TextError as error:
        raise SweepError(f"The text {path} {error}") from error
    if text.cut:
        raise SweepError(
            f"The text {path} is longer than {MOST_BYTES >> 20} MiB. "
            "Give --text-tokens, or a part of it."
        )
    return HeldOut(path.name, text.sha256, text.ids)
