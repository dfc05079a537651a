"""What of a checkpoint doesn't get into the model: refused, or said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from alloc_moe.compiler.errors import CheckpointError
from alloc_moe.compiler.model.files.weight_files import INDEX, SINGLE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alloc_moe.compiler.model.reader import CheckpointReader

# Tensors of layers that predict more than one token, in DeepSeek-V3's, GLM-4.5's and kin's names.
_PREDICTORS = (".eh_proj.", ".enorm.", ".hnorm.", ".shared_head.")
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")
_SHOWN = 3


def leftover_notes(
    folder: Path, reader: CheckpointReader, model: PreTrainedModel, decoder: str, layers: int
) -> Iterator[str]:
    """Yield what is to be said of files and tensors that aren't read.

    Args:
        folder: The checkpoint.
        reader: Its reader.
        model: The model's structure.
        decoder: The name of its list of decoder layers.
        layers: How many it has.

    Raises:
        CheckpointError: There are weights of more decoder layers than config.json says.
    """
    unread = [name for name in reader.unread if not reader.weights.only_for_activations(name)]
    stacks = _stored_stacks(reader, model, decoder)
    further: dict[int, list[str]] = {}
    for name in unread:
        match = _NUMBERED.match(name)
        if match and match[1] in stacks and int(match[2]) >= layers:
            further.setdefault(int(match[2]), []).append(name)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    extra = set()
    for index, names in sorted(further.items()):
        predicts = any(part in f"{name}." for name in names for part in _PREDICTORS)
        if not predicts and not all(_matches(name, ignored) for name in names):
            raise CheckpointError(
                f"The checkpoint {folder} has weights of decoder layer {index}, {names[0]} among "
                f"them, but config.json says that there are {layers} layers (0 to {layers - 1}). "
                "Correct num_hidden_layers in config.json, or remove the tensors."
            )
        extra.update(names)
    if extra:
        indices = ", ".join(map(str, sorted(further)))
        yield (
            f"Layer {indices} of the checkpoint predicts further tokens (multi-token prediction), "
            f"which generation doesn't need: {len(extra)} of its tensors are left out"
        )
    rest = [name for name in unread if name not in extra]
    if rest:
        some = ", ".join(rest[:_SHOWN]) + (", ..." if len(rest) > _SHOWN else "")
        count = len(rest)
        yield f"{count} of the checkpoint's tensors belong to no weight and are left out: {some}"
    if reader.weights.files.paths == (folder / SINGLE,) and (folder / INDEX).exists():
        yield f"There are two sets of weights: {SINGLE} is read, the shards in {INDEX} are left out"
    if not (folder / "tokenizer.json").is_file():
        yield (
            "The checkpoint has no tokenizer.json, which running an artifact needs: with -o DIR/ "
            "it is made of the files that are there and written beside the artifact"
        )
    if (folder / "adapter_config.json").exists():
        yield (
            "The adapter beside the weights (adapter_config.json) is left out: to have it in the "
            "artifact, merge it into the model first (merge_and_unload of PEFT)"
        )


def _stored_stacks(reader: CheckpointReader, model: PreTrainedModel, decoder: str) -> set[str]:
    """Return what comes before a decoder layer's number in the checkpoint's own names."""
    names = [name for name in model.state_dict() if name.startswith(f"{decoder}.")]
    matches = (_NUMBERED.match(key) for name in names for key in reader.keys_of(name))
    return {match[1] for match in matches if match}


def _matches(name: str, patterns: list[str] | tuple[str, ...]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
