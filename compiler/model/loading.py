"""Checkpoint -> MoeModel: weights in memory, or read layer by layer when they run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from alloc_moe.compiler.errors import CheckpointError
from alloc_moe.compiler.model.checkpoint import open_checkpoint, read_generation_config
from alloc_moe.compiler.model.checks.second_reading import check_readings
from alloc_moe.compiler.model.layer_weights import WeightSource
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.offloading import load_offloaded, read_weights, wants_offloading
from alloc_moe.compiler.model.quiet import LIBRARY_ERRORS, first_line, quiet
from alloc_moe.compiler.model.skeleton import build_empty, forget_earlier_lengths
from alloc_moe.compiler.workspace.results import SavedResults

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alloc_moe.compiler.model.checkpoint import Checkpoint
    from alloc_moe.compiler.model.files.stored import StoredWeights
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
        VerificationError: Weights that aren't read by transformers differ from what it reads.
    """
    if console is not None:
        console.note(f"Loading {source}")
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    if wants_offloading(checkpoint.skeleton, offload):
        with quiet():
            model, offloading = load_offloaded(checkpoint, forced=offload == "always")
        moe = MoeModel(checkpoint, model, offloading=offloading, results=SavedResults(results))
    else:
        load = _read_weights if checkpoint.is_part else _load_weights
        moe = MoeModel(checkpoint, load(checkpoint))
    quantized = checkpoint.reader.weights.quantization is not None
    if moe.offloading is not None or quantized or checkpoint.is_part:
        check_readings(checkpoint)
    if console is not None:
        for note in checkpoint.notes:
            console.note(note)
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
    """Let transformers load the tensors of the files that were chosen, and no others."""
    kind = type(checkpoint.skeleton)
    try:
        with quiet(), _tensors(checkpoint.reader.weights) as tensors:
            model: PreTrainedModel = kind.from_pretrained(
                None, config=checkpoint.config, state_dict=tensors, dtype=torch.float32
            ).eval()
    except (*LIBRARY_ERRORS, SafetensorError) as error:
        raise CheckpointError(
            f"transformers can't load the weights in {checkpoint.folder}: {first_line(error)}"
        ) from error
    model.generation_config = read_generation_config(checkpoint)
    forget_earlier_lengths(model)
    return model


def _read_weights(checkpoint: Checkpoint) -> PreTrainedModel:
    """Read all weights of a model that transformers finds under other names only."""
    model = build_empty(
        checkpoint.config, torch.float32, trust_remote_code=checkpoint.trust_remote_code
    )
    read_weights(model, WeightSource(checkpoint.reader))
    model.generation_config = read_generation_config(checkpoint)
    return model.eval()


@contextlib.contextmanager
def _tensors(weights: StoredWeights) -> Iterator[dict[str, Any]]:
    """Yield key -> what gives the tensor when it is sliced, as transformers takes it."""
    with contextlib.ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for path in weights.files.paths:
            shard = stack.enter_context(safe_open(str(path), framework="pt"))
            found = {key: shard.get_slice(key) for key in shard.keys() if key in weights}  # noqa: SIM118
            tensors.update(found)
        yield tensors | {name: _Dequantized(weights, name) for name in weights.quantized}


@dataclass(frozen=True)
class _Dequantized:
    """A quantised tensor whose floats are made when they are asked for."""

    weights: StoredWeights
    name: str

    def __getitem__(self, _: object) -> torch.Tensor:
        return self.weights.load(self.name)
