"""Write a small random checkpoint of a supported family, for tests and for trying things out.

    python examples/checkpoints/small.py deepseek_v2 deepseek/

The weights are random: what such a model says means nothing, but it has what its family has.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

_LIST: dict[str, Any] = tomllib.loads(Path(__file__).with_name("families.toml").read_text("utf-8"))

_NONE = "none"  # TOML has no such value


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    if "text_config" in settings:  # what is shared is of its language model
        return {**settings, "text_config": _completed(settings["text_config"])}
    given = {**_LIST["shared"], **settings}
    return {name: None if value == _NONE else value for name, value in given.items()}


FAMILIES: dict[str, dict[str, Any]] = {
    family: _completed(settings) for family, settings in _LIST["families"].items()
}
"""The configuration of a small model of each family."""

ROUTERS = (".gate.weight", ".router.weight")
"""How names of routers' weights end."""


def byte_tokenizer() -> Any:
    """Return a tokenizer of single bytes with an end and a padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>"
    )


def save_checkpoint(folder: Path, settings: dict[str, Any], *, seed: int = 0) -> Path:
    """Write a random checkpoint, its routers decisive enough to compare runs token by token."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**settings)
    listed = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    kind = AutoModelForCausalLM if listed else AutoModelForImageTextToText
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3 if name.endswith(ROUTERS) else 0.08)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    text = "the experts of a layer are chosen by its router; few of them are enough. " * 40
    (folder / "calibration.txt").write_text(text, "utf-8")
    return folder


if __name__ == "__main__":
    save_checkpoint(Path(sys.argv[2]), FAMILIES[sys.argv[1]])
