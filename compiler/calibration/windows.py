"""Text -> calibration set: the seeded windows of tokens that sensitivities are measured on."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from alloc_moe.compiler.errors import CalibrationError
from alloc_moe.runtime.artifact.shapes import ShapeError
from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.text.chat import ChatTemplate
from alloc_moe.runtime.text.reading import (
    MOST_BYTES,
    Encode,
    Encoded,
    TextError,
    TextIds,
    read_ids,
)
from alloc_moe.runtime.text.sources import Part, has_objects, joined, open_text, part_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from alloc_moe.compiler.model.checkpoint import Checkpoint
    from alloc_moe.compiler.records import CalibrationOptions
    from alloc_moe.runtime.console import Console

logger = logging.getLogger(__name__)

_SEQUENCE_LENGTH = 512
_FURTHER = 7  # windows drawn behind each one asked for
_CHARACTERS_PER_TOKEN = 20  # read of a dataset: about five times what the tokens need
_DATASET = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Windows of tokens of a text.

    ``tokens == ids.size`` is what there is, near what was asked for; ``sha256`` is of the text.
    ``further`` are windows drawn behind these, for what overfits to as few: seven times as many,
    fewer if the text is shorter, None if there are no others.
    """

    ids: npt.NDArray[np.int64]  # [windows, sequence_length]
    sha256: str
    seed: int
    tokens: int
    sequence_length: int
    name: str
    further: npt.NDArray[np.int64] | None = None  # [windows, sequence_length]

    @property
    def all_ids(self) -> npt.NDArray[np.int64]:
        """All windows [windows, sequence_length], the further ones last."""
        return self.ids if self.further is None else np.concatenate([self.ids, self.further])


def calibrate(
    checkpoint: Checkpoint, options: CalibrationOptions, console: Console
) -> CalibrationSet:
    """Return tokens of the text asked for, else of calibration.txt beside the model, else built-in.

    Raises:
        CalibrationError: The text can't be read, is too short, or doesn't suit the model.
    """
    beside = checkpoint.folder / "calibration.txt"
    text = options.text
    if text is None:
        built_in = Path(__file__).with_name("built_in.txt")
        text = str(beside if beside.is_file() else built_in)
        console.note(
            f"Calibrating on {text}"
            if beside.is_file()
            else "Calibrating on the built-in text (public-domain English prose); "
            "give --calibration with text like yours for a plan that fits it better"
        )
    return load_calibration(
        text, checkpoint.tokenizer, checkpoint.config, tokens=options.tokens, seed=options.seed
    )


def check_source(source: str | None) -> None:
    """Raise CalibrationError for a file that can't be opened: said before a model is loaded."""
    if source is None or _dataset(Path(source)):
        return
    try:
        with Path(source).open("rb"):
            pass
    except OSError as error:
        raise _unreadable(source, error) from error


def load_calibration(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    *,
    tokens: int,
    seed: int,
) -> CalibrationSet:
    """Return windows that don't overlap, drawn from a text with a seed.

    Args:
        source: A UTF-8 text file, or conversations (``.jsonl``, see `runtime.text.sources`), or
            ``owner/name`` or ``owner/name:config`` of a dataset on the Hugging Face hub, whose
            train split is read from its beginning.
        tokenizer: The model's.
        config: The model's. Windows have 512 tokens, fewer if the model takes fewer.
        tokens: How many tokens to draw; rounded to whole windows, and fewer if the text is shorter.
        seed: Decides which windows are drawn.

    Raises:
        CalibrationError: The text can't be read, is too short, or doesn't suit the model.
    """
    if tokens < 2:
        raise CalibrationError(f"Calibration needs at least 2 tokens, not {tokens}.")
    text = _read(source, tokens, tokenizer)
    encoded = _checked(text, source, config)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = min(_SEQUENCE_LENGTH, positions or _SEQUENCE_LENGTH, tokens, len(encoded))
    available = len(encoded) // length
    wanted = (tokens + length // 2) // length
    if available < wanted:
        logger.warning(
            "The calibration text %s has %d tokens, fewer than the %d asked for; %d are used.",
            source,
            len(encoded),
            tokens,
            available * length,
        )
    windows = encoded[: available * length].reshape(available, length)
    order = np.random.default_rng(seed).permutation(available)
    ids, further = (
        windows[part].astype(np.int64)
        for part in (order[:wanted], order[wanted : (1 + _FURTHER) * wanted])
    )
    return CalibrationSet(
        ids=ids,
        sha256=text.sha256,
        seed=seed,
        tokens=ids.size,
        sequence_length=length,
        name=str(source),
        further=further if len(further) else None,
    )


def _read(source: str | Path, tokens: int, tokenizer: PreTrainedTokenizerBase) -> TextIds:
    path = Path(source)
    encode = encoder(tokenizer)
    match = _dataset(path)
    try:
        if match:
            template, characters = chat_template(tokenizer), tokens * _CHARACTERS_PER_TOKEN
            data = _read_dataset(match["id"], match["config"], template, characters)
            return read_ids(io.BytesIO(data), encode, most_bytes=max(MOST_BYTES, len(data)))
        with open_source(path, tokenizer) as file:
            text = read_ids(file, encode)
    except OSError as error:
        raise _unreadable(source, error) from error
    except TextError as error:
        raise CalibrationError(f"The calibration text {source} {error}") from error
    if text.cut:
        logger.warning(
            "The calibration text %s is longer than %d MiB, from which windows are drawn.",
            source,
            MOST_BYTES >> 20,
        )
    return text


def _dataset(path: Path) -> re.Match[str] | None:
    """Return the parts of a dataset's id, unless that is where a file is or could be."""
    is_file = path.exists() or path.parent.is_dir() or path.suffix == ".txt" or has_objects(path)
    return None if is_file else _DATASET.fullmatch(str(path))


def _unreadable(source: str | Path, error: OSError) -> CalibrationError:
    return CalibrationError(
        f"The calibration text {source} can't be read: {error.strerror}. "
        "Give a text file, or a dataset of the Hugging Face hub as owner/name."
    )


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Return the tokenizer as `read_ids` takes it: without tokens that no text has."""
    places = {"return_offsets_mapping": True} if getattr(tokenizer, "is_fast", False) else {}

    def encode(text: str) -> Encoded:
        found = tokenizer(text, add_special_tokens=False, verbose=False, **places)
        return found["input_ids"], found["offset_mapping"] if places else None

    return encode


def open_source(path: Path, tokenizer: PreTrainedTokenizerBase) -> BinaryIO:
    """Open a file of text, or of conversations for a model of this tokenizer: see `open_text`."""
    return open_text(path, chat_template(tokenizer))


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Return the chat template for conversations without tools, None if there is none."""
    found = getattr(tokenizer, "chat_template", None)  # a text, or texts by name
    source = found.get("default") if isinstance(found, Mapping) else found
    if source is None:
        return None
    return ChatTemplate(
        source,
        name="the model",
        tokens=tokenizer.special_tokens_map,
        advice="Correct it in the tokenizer's files of the checkpoint.",
    )


def _checked(text: TextIds, source: str | Path, config: PreTrainedConfig) -> npt.NDArray[np.intc]:
    if text.blank:
        raise CalibrationError(f"The calibration text {source} is empty.")
    if len(text.ids) < 2:
        raise CalibrationError(
            f"The calibration text {source} has {len(text.ids)} token; at least 2 are needed, "
            "and thousands to tell layers apart."
        )
    vocabulary = config.get_text_config().vocab_size
    largest = int(text.ids.max())
    if largest >= vocabulary:
        raise CalibrationError(
            f"The tokenizer gives token {largest}, but the model's vocabulary has {vocabulary} "
            "tokens: it is the tokenizer of another model. Put the model's own beside its weights."
        )
    return text.ids


def _read_dataset(
    dataset_id: str, config: str | None, template: ChatTemplate | None, characters: int
) -> bytes:
    """Return the first `characters` or more of the train split."""
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"There is no file {dataset_id}, and reading it as a dataset of the Hugging Face hub "
            "needs the datasets library. Check the path, or run: pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(dataset_id, config, split="train", streaming=True)
        return "".join(joined(_take(rows, dataset_id, template, characters))).encode()
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"There is no file {dataset_id}, and the Hugging Face hub gave no such dataset: "
            f"{str(error).partition(chr(10))[0] or type(error).__name__}"
        ) from error


def _take(
    rows: Iterable[Mapping[str, Any]],
    dataset_id: str,
    template: ChatTemplate | None,
    characters: int,
) -> Iterator[Part]:
    for number, row in enumerate(rows, 1):
        try:
            part = part_of(row, template)
        except (ShapeError, GenerationError) as error:
            raise CalibrationError(
                f"Row {number} of the dataset {dataset_id} is no text: {str(error).rstrip('.')}. "
                "Write texts or conversations to a file, and give that."
            ) from error
        yield part
        characters -= len(part.text)
        if characters <= 0:
            return
