"""Hugging Face folder or hub id -> MoeModel."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alloc_moe.compiler import architectures
from alloc_moe.compiler.checkpoint import CheckpointReader, find_shards, fingerprint
from alloc_moe.compiler.errors import CheckpointError, UnsupportedModelError
from alloc_moe.compiler.offload import load_offloaded, wants_offloading
from alloc_moe.compiler.quiet import first_line, quiet
from alloc_moe.compiler.records import MoeLayer, MoeModel, OffloadMode
from alloc_moe.compiler.skeleton import build_skeleton, experts_modules, probe_experts_per_token

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


def load_model(
    source: str, *, trust_remote_code: bool = False, offload: OffloadMode = "auto"
) -> MoeModel:
    """Load a checkpoint and find its MoE layers.

    Args:
        source: A folder in the Hugging Face layout, or the id of a model on the hub; only an id
            that is no folder here is downloaded.
        trust_remote_code: Run Python files of the checkpoint, as transformers understands it.
        offload: Whether decoder layers are read from the checkpoint when they run; ``auto``: if
            the model is too large for this machine's memory.

    Returns:
        The model in float32, in eval mode.

    Raises:
        CheckpointError: Files are missing, unreadable, or don't belong together.
        UnsupportedModelError: No MoE model, or one that can't be compiled.
    """
    folder = resolve_folder(source)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    find_shards(folder)
    skeleton = build_skeleton_or_refuse(config, trust_remote_code=trust_remote_code)
    layers = find_moe_layers(skeleton)
    reader = CheckpointReader(folder, skeleton)
    tokenizer = _load_tokenizer(folder, trust_remote_code=trust_remote_code)
    offloading = None
    if wants_offloading(skeleton, offload):
        with quiet():
            model, offloading = load_offloaded(
                config,
                folder,
                reader,
                layers,
                forced=offload == "always",
                trust_remote_code=trust_remote_code,
            )
    else:
        model = _load_weights(folder, trust_remote_code=trust_remote_code)
    return MoeModel(
        source=source,
        folder=folder,
        fingerprint=fingerprint(folder),
        config=config,
        model=model,
        skeleton=skeleton,
        reader=reader,
        tokenizer=tokenizer,
        layers=layers,
        offloading=offloading,
    )


def resolve_folder(source: str) -> Path:
    """Return the local folder of `source`, downloading a hub id.

    Raises:
        CheckpointError: Neither a folder with a config.json nor an id that can be downloaded.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} has no config.json, so it is no checkpoint in the Hugging Face layout. "
                "Give the folder that save_pretrained wrote."
            )
        return path
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
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"transformers can't read {folder / 'config.json'}: {first_line(error)} "
            "Use a model type that transformers 5 knows, or --trust-remote-code for your own."
        ) from error
    reason = architectures.UNSUPPORTED.get(config.model_type, "")
    if reason:
        raise UnsupportedModelError(f"{config.model_type} can't be compiled: {reason}.")
    return config


def build_skeleton_or_refuse(
    config: PreTrainedConfig, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the weightless float32 model of `config`.

    Raises:
        UnsupportedModelError: The configuration is none of a causal language model.
    """
    try:
        with quiet():
            return build_skeleton(config, torch.float32, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{config.model_type} is no causal language model that transformers can build: "
            f"{first_line(error)}"
        ) from error


def find_moe_layers(model: PreTrainedModel) -> tuple[MoeLayer, ...]:
    """Return the MoE layers in the order in which tokens pass them.

    Raises:
        UnsupportedModelError: There are none, or their experts can't be lowered.
    """
    experts = experts_modules(model)
    if not experts:
        raise UnsupportedModelError(_why_no_experts(model))
    for name, module in experts.items():
        _check_experts(model, name, module)
    per_token = probe_experts_per_token(model)
    layers = tuple(
        MoeLayer(
            name=name.rpartition(".")[0],
            experts_name=name,
            decoder_layer=_decoder_index(name),
            num_experts=module.get_parameter("gate_up_proj").shape[0],
            experts_per_token=per_token[name],
        )
        for name, module in experts.items()
        if name in per_token
    )
    if all(layer.experts_per_token == 1 for layer in layers):
        raise UnsupportedModelError(
            f"Every token activates 1 expert per layer in {model.config.model_type}, "
            "so there is nothing to allocate."
        )
    return layers


def _why_no_experts(model: PreTrainedModel) -> str:
    kind = model.config.model_type
    suspects = sorted(
        {
            type(m).__name__
            for m in model.modules()
            if re.search("expert|moe", type(m).__name__, re.I)
        }
    )
    if suspects:
        return (
            f"The experts of {kind} ({', '.join(suspects[:3])}) don't follow the fused layout of "
            "transformers 5 (gate_up_proj and down_proj over all experts), so they can't be found. "
            "Supported are OLMoE, Qwen2/3-MoE, Mixtral, DeepSeek-V2/V3 and their kin."
        )
    return (
        f"{kind} is a dense model: it has no routed experts, so there is nothing to allocate. "
        "Give a Mixture-of-Experts checkpoint."
    )


def _check_experts(model: PreTrainedModel, name: str, module: Any) -> None:
    if not architectures.is_silu_gated(module):
        gate = "" if module.has_gate else " without a gate"
        raise UnsupportedModelError(
            f"{model.config.model_type}'s experts ({name}) compute "
            f"{getattr(module, 'act_fn', type(module).__name__)}{gate}; onnxruntime's MoE operator "
            "computes SiLU-gated experts only."
        )


def _decoder_index(name: str) -> int:
    match = re.search(r"\.(\d+)\.", name)
    if match is None:
        raise UnsupportedModelError(
            f"The experts module {name} is in no numbered decoder layer, so its place is unknown."
        )
    return int(match[1])


def _load_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
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


def _load_weights(folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    try:
        with quiet():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
            ).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"transformers can't load the weights in {folder}: {first_line(error)}"
        ) from error
    return model
