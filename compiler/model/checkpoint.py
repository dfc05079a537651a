"""Hugging Face folder or hub id -> Checkpoint: what is on disk, before any weight is read."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
)

from alloc_moe.compiler.errors import CheckpointError, UnsupportedModelError
from alloc_moe.compiler.model import architectures
from alloc_moe.compiler.model.checks.leftovers import leftover_notes
from alloc_moe.compiler.model.checks.pinning import pin_settings
from alloc_moe.compiler.model.checks.settings import (
    check_architecture,
    check_number_of_layers,
    check_sizes,
)
from alloc_moe.compiler.model.files.json_files import read_json_object
from alloc_moe.compiler.model.files.stored import open_weights
from alloc_moe.compiler.model.files.weight_files import CONFIG, fingerprint
from alloc_moe.compiler.model.moe_layers import find_moe_layers
from alloc_moe.compiler.model.quiet import LIBRARY_ERRORS, first_line, quiet
from alloc_moe.compiler.model.reader import CheckpointReader, differently_tied
from alloc_moe.compiler.model.replay import find_decoder_layers
from alloc_moe.compiler.model.skeleton import build_skeleton, causal_class
from alloc_moe.runtime.artifact.files import checkpoint_plan
from alloc_moe.runtime.artifact.plan import CHECKPOINT_PLAN_FILE, CHECKPOINT_SHIFTS_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from alloc_moe.compiler.records import MoeLayer

logger = logging.getLogger(__name__)

_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    ``source`` is what the user called it, ``folder`` where it lies. ``skeleton`` is its model in
    float32 without weights, ``reader`` reads single ones of them; ``fingerprint`` is a hash of
    configuration and weights. ``layers`` are its MoE layers, in the order in which tokens pass.
    ``notes`` say what of it is left out; ``is_part``, that transformers can't load what is left by
    itself.
    """

    source: str
    folder: Path
    fingerprint: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    skeleton: PreTrainedModel
    layers: tuple[MoeLayer, ...]
    reader: CheckpointReader
    trust_remote_code: bool = False
    notes: tuple[str, ...] = ()
    is_part: bool = False


def open_checkpoint(source: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """Find a checkpoint and read what says what it is.

    Args:
        source: A folder in the Hugging Face layout, or the id of a model on the hub; only an id
            that is no folder here is downloaded.
        trust_remote_code: Run Python files of the checkpoint, as transformers understands it.

    Raises:
        CheckpointError: Files are missing, unreadable, or don't belong together.
        UnsupportedModelError: No MoE model, or one that can't be compiled.
    """
    folder = resolve_folder(source)
    _check_untouched(folder)
    settings = read_json_object(folder / CONFIG)
    weights = open_weights(folder, settings)
    check_sizes(settings)
    check_number_of_layers(settings, weights)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    check_architecture(config, weights)
    skeleton = build_skeleton_or_refuse(config, trust_remote_code=trust_remote_code)
    layers = _moe_layers(skeleton)
    reader = CheckpointReader(weights, skeleton)
    if differently_tied(skeleton, reader):
        # As transformers does: weights that are there and differ are not replaced by each other.
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
        skeleton = build_skeleton_or_refuse(config, trust_remote_code=trust_remote_code)
        reader = CheckpointReader(weights, skeleton)
    stack = find_decoder_layers(skeleton, layers[0])
    return Checkpoint(
        source=source,
        folder=folder,
        config=config,
        tokenizer=_load_tokenizer(folder, trust_remote_code=trust_remote_code),
        skeleton=skeleton,
        layers=layers,
        reader=reader,
        fingerprint=fingerprint(weights.files),
        trust_remote_code=trust_remote_code,
        notes=tuple(
            leftover_notes(folder, reader, skeleton, _name_of(stack, skeleton), len(stack))
        ),
        is_part=settings.get("model_type") in architectures.TEXT_PARTS,
    )


def _moe_layers(skeleton: PreTrainedModel) -> tuple[MoeLayer, ...]:
    """Return the MoE layers, or refuse a model that doesn't run as it was configured."""
    try:
        with quiet():  # hybrids tell which kernels aren't installed
            return find_moe_layers(skeleton)
    except UnsupportedModelError:
        raise
    except LIBRARY_ERRORS as error:
        raise UnsupportedModelError(
            f"transformers builds a {skeleton.config.model_type} of this config.json, but can't "
            f"run it: {first_line(error)} Is it as it was published?"
        ) from error


def _check_untouched(folder: Path) -> None:
    """Refuse what was corrected for a budget already: it is none of the model's weights."""
    plan = checkpoint_plan(folder)
    if plan is None:
        if (folder / CHECKPOINT_SHIFTS_FILE).exists():
            raise CheckpointError(
                f"{folder} has a {CHECKPOINT_SHIFTS_FILE} but no {CHECKPOINT_PLAN_FILE}: its "
                "experts are corrected for some budget. Give the original model."
            )
        return
    untouched = ["none"] * len(plan.layers)
    if plan.correction.get("layers", untouched) != untouched:
        raise CheckpointError(
            f"{folder} was written by --target checkpoint: its experts are corrected for "
            f"{plan.budget.activations:.6g} of {plan.budget.original} activations. Give the "
            f"original model, {plan.source}."
        )


def _name_of(module: torch.nn.Module, model: PreTrainedModel) -> str:
    name: str = next(name for name, found in model.named_modules() if found is module)
    return name


def resolve_folder(source: str) -> Path:
    """Return the local folder of `source`, downloading a hub id.

    Raises:
        CheckpointError: Neither a folder with a config.json nor an id that can be downloaded.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            if (path / "adapter_config.json").is_file():
                raise CheckpointError(
                    f"{path} holds an adapter (adapter_config.json), no model. Merge it into its "
                    "base model with merge_and_unload() of PEFT, and give the folder of that."
                )
            raise CheckpointError(
                f"{path} has no config.json, so it is no checkpoint in the Hugging Face layout. "
                "Give the folder that save_pretrained wrote."
            )
        return path
    if path.is_file():
        raise CheckpointError(
            f"{source!r} is a file. Give the folder of a checkpoint, with its config.json."
        )
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise CheckpointError(
            f"{source!r} is neither a folder nor a model id of the form owner/name. Check the path."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    logger.info("Downloading %s from the hub", source)
    try:
        return Path(snapshot_download(source, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"There is no folder {source!r}, and the hub gave no model of that name "
            f"({first_line(error)}). Check the path, or the id and the network."
        ) from error


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read config.json.

    Raises:
        CheckpointError: The file can't be read.
        UnsupportedModelError: transformers doesn't know the model type, or we know it can't work.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
            reason = architectures.UNSUPPORTED.get(config.model_type, "")
            reason = reason or architectures.why_cache_is_unsupported(config)
    except LIBRARY_ERRORS as error:
        raise UnsupportedModelError(
            f"transformers can't read {folder / 'config.json'}: {first_line(error)} "
            "Use a model type that transformers 5 knows, or --trust-remote-code for your own."
        ) from error
    if reason:
        raise UnsupportedModelError(f"{config.model_type} can't be compiled: {reason}.")
    config = _of_text(config)
    pin_settings(config)
    return config


def _of_text(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return what the causal language model is built of: a part, if images are taken as well."""
    if config.model_type in architectures.TEXT_PARTS:
        return architectures.text_part(config)
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    needed = getattr(model, "config_class", None) or type(config)
    return config if isinstance(config, needed) else config.get_text_config(decoder=True)


def read_generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """Return generation_config.json; without one what config.json says of generation.

    Raises:
        CheckpointError: It has settings that can't be.
    """
    folder = checkpoint.folder
    try:
        with quiet():
            try:
                return GenerationConfig.from_pretrained(folder, local_files_only=True)
            except OSError:  # there is none: what transformers does then
                return GenerationConfig.from_pretrained(
                    folder, config_file_name=CONFIG, _from_model_config=True, local_files_only=True
                )
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"{folder / 'generation_config.json'} can't be read: {first_line(error)}. Correct or "
            "remove it."
        ) from error


def build_skeleton_or_refuse(
    config: PreTrainedConfig, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the weightless float32 model of `config`.

    Raises:
        UnsupportedModelError: The configuration is none of a causal language model.
    """
    if causal_class(config) is None:
        raise UnsupportedModelError(
            f"{config.model_type} takes images beside text, and transformers builds no causal "
            "language model of its text part alone, so it can't be compiled."
        )
    try:
        with quiet():
            return build_skeleton(config, torch.float32, trust_remote_code=trust_remote_code)
    except LIBRARY_ERRORS as error:
        raise UnsupportedModelError(
            f"{config.model_type} is no causal language model that transformers can build: "
            f"{first_line(error)} Is its config.json complete, and as it was published?"
        ) from error


def _load_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can load "
            f"({first_line(error)}). Put tokenizer.json and tokenizer_config.json there."
        ) from error
    # Without files transformers makes an empty tokenizer of the model's family.
    names = sorted(set(tokenizer.vocab_files_names.values()))
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(
            f"{folder} has no tokenizer: none of {', '.join(names)} is there. "
            "Put tokenizer.json and tokenizer_config.json there."
        )
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"The tokenizer in {folder} has no tokenizer.json, which the runtime needs. "
            "Convert it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    return tokenizer
