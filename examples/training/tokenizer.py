"""The tokenizer of the tiny example model."""

import corpus
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Tokens = npt.NDArray[np.uint16]

PADDING = "<|padding|>"


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer that adds no special tokens and decodes exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[corpus.END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(corpus.END_OF_TEXT), trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the tokenizer as transformers wants it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=corpus.END_OF_TEXT,
        eos_token=corpus.END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tokens:
    """Return the ids of a text in which END_OF_TEXT ends each document."""
    pieces = text.split(corpus.END_OF_TEXT)[:-1]
    ids = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(corpus.END_OF_TEXT)
    return np.concatenate([np.array([*piece, end], dtype=np.uint16) for piece in ids])
