"""Checkpoint -> MoeModel: weights in memory, or read layer by layer when they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from alloc_moe.compiler.errors import CheckpointError
from alloc_moe.compiler.model.checkpoint import open_checkpoint
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.offloading import load_offloaded, wants_offloading
from alloc_moe.compiler.model.quiet import first_line, quiet
from alloc_moe.compiler.workspace.results import SavedResults

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alloc_moe.compiler.model.checkpoint import Checkpoint
    from alloc_moe.compiler.records import OffloadMode
    from alloc_moe.runtime.console import Console


def load_model(
    source: str,
    console: Console | None = None,
    *,
    trust_remote_code: bool = False,
    offload: OffloadMode = "auto",
    results: Path | None = None,
) -> MoeModel:
    """Load a checkpoint, and say what was found.

    Args:
        source: A folder in the Hugging Face layout, or the id of a model on the hub; only an id
            that is no folder here is downloaded.
        console: Where that is said.
        trust_remote_code: Run Python files of the checkpoint, as transformers understands it.
        offload: Whether decoder layers are read from the checkpoint when they run; ``auto``: if
            the model is too large for this machine's memory.
        results: Where a model so read keeps what took long to compute; None keeps nothing.

    Returns:
        The model in float32, in eval mode.

    Raises:
        CheckpointError: Files are missing, unreadable, or don't belong together.
        UnsupportedModelError: No MoE model, or one that can't be compiled.
    """
    if console is not None:
        console.note(f"Loading {source}")
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    if wants_offloading(checkpoint.skeleton, offload):
        with quiet():
            model, offloading = load_offloaded(checkpoint, forced=offload == "always")
        moe = MoeModel(checkpoint, model, offloading=offloading, results=SavedResults(results))
    else:
        moe = MoeModel(checkpoint, _load_weights(checkpoint))
    if console is not None:
        _describe(moe, console)
    return moe


def _describe(moe: MoeModel, console: Console) -> None:
    ks = sorted({layer.experts_per_token for layer in moe.layers})
    experts = sorted({layer.num_experts for layer in moe.layers})
    console.note(
        f"{moe.config.model_type}: {len(moe.layers)} MoE layers, "
        f"{'/'.join(map(str, experts))} experts, top-{'/'.join(map(str, ks))}"
    )
    if moe.offloading is not None:
        console.note(moe.offloading.describe())


def _load_weights(checkpoint: Checkpoint) -> PreTrainedModel:
    folder = checkpoint.folder
    try:
        with quiet():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=checkpoint.trust_remote_code,
            ).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"transformers can't load the weights in {folder}: {first_line(error)}"
        ) from error
    return model
