"""Which weights an artifact stores in 4 or 8 bits.

Experts, attention, shared experts, dense layers and the head take the bits of the ``dtype``;
embeddings always 8, as only one row per token is read of them; routers and what has a handful of
outputs stay floats. So do, for the CPU, the weights that make keys and values of latents: they are
multiplied head by head, for which there is no operator of few bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.model.architectures import expert_weights, latent_attention
from alloc_moe.compiler.model.skeleton import parameter_names
from alloc_moe.compiler.records import Quantization
from alloc_moe.passes.blockwise import BlockFormat, block_that_fits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from alloc_moe.compiler.model.checkpoint import Checkpoint
    from alloc_moe.compiler.records import DType, MoeLayer, TargetOptions

BITS: Mapping[str, int] = {"int8": 8, "int4": 4}
"""The quantised types and the bits of their experts."""

BLOCK = 128
"""The most weights that share a scale: fewer bytes and faster products than with 64."""

HEAD_BLOCK = 64
"""The most in embeddings and the head: 128 in both attention and head costs too much quality, and
prompts, which are bound by arithmetic, hardly need these."""

MIXED_BITS = (4, 8)
"""What the experts of a layer may take where a plan chooses, the fewest first."""

_EMBEDDING_BITS = 8
_FEW_OUTPUTS = 32


@dataclass(frozen=True)
class Storage:
    """How an artifact's weights are stored: as ``chosen`` says, or in floats of ``dtype``.

    ``formats`` are those that each MoE layer's experts may be stored in, where a plan chooses.
    """

    dtype: DType
    chosen: Quantization | None = None
    formats: tuple[tuple[BlockFormat, ...], ...] = ()


def choose_storage(checkpoint: Checkpoint, target: TargetOptions) -> Storage:
    """Return how the weights that are asked for are stored.

    Raises:
        UnsupportedModelError: The rows of the experts can't be divided into blocks.
    """
    if target.dtype not in BITS:
        return Storage(target.dtype)
    chosen = choose_formats(checkpoint, target.dtype, block=target.block, device=target.device)
    return Storage(target.dtype, chosen, mixed_formats(chosen) if target.mixed_bits else ())


def choose_formats(
    checkpoint: Checkpoint, dtype: str, *, block: int = BLOCK, device: str = "cpu"
) -> Quantization:
    """Return what is stored how.

    Args:
        checkpoint: Its weights are not read.
        dtype: A key of `BITS`.
        block: The most weights that share a scale, `HEAD_BLOCK` at most in the head and in
            embeddings; fewer where they don't divide a row.
        device: Where the artifact will run: activations are float32 on the CPU, float16 on CUDA.

    Raises:
        UnsupportedModelError: The rows of the experts can't be divided into blocks.
    """
    skeleton, layers = checkpoint.skeleton, checkpoint.layers
    experts = []
    for layer in layers:
        module: Any = skeleton.get_submodule(layer.experts_name)
        axis = -2 if module.is_transposed else -1
        columns = [module.get_parameter(leaf).shape[axis] for leaf in expert_weights(module)]
        fitting = block_that_fits(block, columns)
        if fitting is None:
            raise UnsupportedModelError(
                f"The experts of {layer.name} have rows of {columns[0]} and {columns[1]}, which "
                "blocks of 16 weights or more don't divide, so they can't be quantised. "
                "Use --dtype float32."
            )
        experts.append(BlockFormat(BITS[dtype], fitting))
    weights = dict(_linear_formats(skeleton, layers, BITS[dtype], block))
    if device == "cpu":
        for name in latent_attention(skeleton):
            weights.pop(f"{name}.kv_b_proj.weight", None)
    activations = "float32" if device == "cpu" else "float16"
    return Quantization(dtype, activations, weights, tuple(experts))


def _linear_formats(
    skeleton: PreTrainedModel, layers: Sequence[MoeLayer], bits: int, block: int
) -> Iterator[tuple[str, BlockFormat]]:
    routers = {(layer.name, layer.num_experts) for layer in layers}
    groups = [group for group in parameter_names(skeleton) if len(group) > 1]
    shared = {name: group for group in groups for name in group}
    ends = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    for name, module in skeleton.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, torch.nn.Linear | torch.nn.Embedding) or weight is None:
            continue
        rows, columns = weight.shape
        most = min(block, HEAD_BLOCK) if module in ends else block
        fitting = block_that_fits(most, [columns])
        if fitting is None or rows < _FEW_OUTPUTS or (name.rpartition(".")[0], rows) in routers:
            continue
        # A tied head reads what embeds: the finer of the two.
        embeds = isinstance(module, torch.nn.Embedding) or f"{name}.weight" in shared
        form = BlockFormat(_EMBEDDING_BITS if embeds else bits, fitting)
        for alias in shared.get(f"{name}.weight", (f"{name}.weight",)):
            yield alias, form


def mixed_formats(quantization: Quantization) -> tuple[tuple[BlockFormat, ...], ...]:
    """Return the formats to choose each layer's experts from, in the order of `MIXED_BITS`."""
    return tuple(
        tuple(BlockFormat(bits, form.block) for bits in MIXED_BITS) for form in quantization.experts
    )


def formats_of_bits(
    formats: Sequence[Sequence[BlockFormat]], bits: Sequence[int]
) -> tuple[BlockFormat, ...]:
    """Return each layer's format of the bits chosen for it."""
    return tuple(
        next(form for form in choices if form.bits == wanted)
        for choices, wanted in zip(formats, bits, strict=True)
    )
