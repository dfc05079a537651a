"""Which weights an artifact stores in 4 or 8 bits, and PyTorch models that compute with the same.

Experts, attention, shared experts, dense layers and the head take the bits of the ``dtype``;
embeddings always 8, as only one row per token is read of them; routers and what has a handful of
outputs stay floats. Everything that a plan is measured on runs with the rounded weights, so that
sensitivities, thresholds and corrections are those of the artifact. Where the plan chooses the bits
of each layer's experts, these stay floats until it has; see `sensitivity_bits`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import onnx_ir as ir
import torch

from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.skeleton import parameter_names
from alloc_moe.passes.blockwise import BlockFormat, block_that_fits, dequantize, quantize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from alloc_moe.compiler.records import MoeLayer, MoeModel

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
_EXACT_EXPERTS = "ORT_QMOE_CPU_QNBIT_GEMM"
_FEW_OUTPUTS = 32
_EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Quantization:
    """How an artifact stores its weights.

    ``weights`` has a format by parameter name for linear layers and embeddings, ``experts`` one per
    MoE layer, none while they are not chosen; ``activations`` is the type of everything else.
    """

    dtype: str
    activations: str
    weights: Mapping[str, BlockFormat]
    experts: tuple[BlockFormat, ...]

    def to_plan(self) -> dict[str, Any]:
        """Return the plan's ``quantization`` entry."""
        return {
            "dtype": self.dtype,
            "activations": self.activations,
            "expert_bits": [form.bits for form in self.experts],
            "expert_block": [form.block for form in self.experts],
            "blocks": sorted({form.block for form in self.weights.values()}),
        }


def choose_formats(
    skeleton: PreTrainedModel,
    layers: Sequence[MoeLayer],
    dtype: str,
    *,
    block: int = BLOCK,
    device: str = "cpu",
) -> Quantization:
    """Return what is stored how.

    Args:
        skeleton: The model; its weights are not used.
        layers: Its MoE layers.
        dtype: A key of `BITS`.
        block: The most weights that share a scale, `HEAD_BLOCK` at most in the head and in
            embeddings; fewer where they don't divide a row.
        device: Where the artifact will run: activations are float32 on the CPU, float16 on CUDA.

    Raises:
        UnsupportedModelError: The rows of the experts can't be divided into blocks.
    """
    experts = []
    for layer in layers:
        module: Any = skeleton.get_submodule(layer.experts_name)
        axis = -2 if module.is_transposed else -1
        columns = [module.gate_up_proj.shape[axis], module.down_proj.shape[axis]]
        fitting = block_that_fits(block, columns)
        if fitting is None:
            raise UnsupportedModelError(
                f"The experts of {layer.name} have rows of {columns[0]} and {columns[1]}, which "
                "blocks of 16 weights or more don't divide, so they can't be quantised. "
                "Use --dtype float32."
            )
        experts.append(BlockFormat(BITS[dtype], fitting))
    weights = dict(_linear_formats(skeleton, layers, BITS[dtype], block))
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


def rounded(moe: MoeModel, dtype: str, *, block: int = BLOCK) -> MoeModel:
    """Return the model with weights as an artifact of `dtype` for the CPU has them.

    Its weights are changed in place, if `dtype` is a key of `BITS`.
    """
    if dtype not in BITS:
        return moe
    return quantized(moe, choose_formats(moe.skeleton, moe.layers, dtype, block=block))


def quantized(moe: MoeModel, quantization: Quantization, *, round_experts: bool = True) -> MoeModel:
    """Return the model with every quantised weight replaced by what the artifact computes with.

    Its weights are changed in place; those of offloaded layers whenever they are read. Without
    ``round_experts`` those of experts stay as they are, for `with_expert_formats` to round.
    """
    blocks = {form.block for form in (*quantization.experts, *quantization.weights.values())}
    mark = f"{quantization.dtype}/{'/'.join(map(str, sorted(blocks)))}"
    if not round_experts:
        quantization = dataclasses.replace(quantization, experts=())
    moe = dataclasses.replace(moe, quantization=quantization)
    _round_weights(moe)
    return dataclasses.replace(moe, fingerprint=f"{moe.fingerprint}:{mark}")


def with_expert_formats(moe: MoeModel, experts: Sequence[BlockFormat]) -> MoeModel:
    """Return the model with its experts, floats until now, rounded to a format a layer.

    In place, as by `quantized`.
    """
    assert moe.quantization is not None
    assert not moe.quantization.experts
    rounded = _stored(moe)
    quantization = dataclasses.replace(moe.quantization, experts=tuple(experts))
    moe = dataclasses.replace(moe, quantization=quantization)
    _round_weights(moe, rounded=rounded)
    mark = "/".join(str(form.bits) for form in experts)
    return dataclasses.replace(moe, fingerprint=f"{moe.fingerprint}:{mark}")


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


@contextlib.contextmanager
def rounded_experts(experts: torch.nn.Module, form: BlockFormat) -> Iterator[None]:
    """Let an experts module compute with rounded weights while the block lasts.

    Takes the memory of its weights once more. Those of an offloaded layer must be in memory.
    """
    module: Any = experts
    floats = {leaf: getattr(module, leaf) for leaf in _EXPERT_WEIGHTS}
    try:
        for leaf, parameter in floats.items():
            values = _rounded(parameter.detach(), form, bool(module.is_transposed))
            setattr(module, leaf, torch.nn.Parameter(values, requires_grad=False))
        yield
    finally:
        for leaf, parameter in floats.items():
            setattr(module, leaf, parameter)


def _round_weights(moe: MoeModel, *, rounded: Collection[str] = ()) -> None:
    """Round what `moe.quantization` names, except for those in memory that are `rounded`."""
    stored = _stored(moe)
    if moe.offloading is not None:
        moe.offloading.source.transform = functools.partial(_read_rounded, moe, stored)
    for name, parameter in _resident(moe, stored):
        if name not in rounded:
            _round_in_place(parameter, *stored[name])


def _round_in_place(weight: torch.Tensor, form: BlockFormat, transposed: bool) -> None:
    if transposed or not weight.is_contiguous():
        weight.copy_(_rounded(weight, form, transposed))
        return
    values = weight.numpy()  # fresh memory would take longer than the rounding
    dequantize(*quantize(values, form), form, out=values)


def _read_rounded(
    moe: MoeModel,
    stored: Mapping[str, tuple[BlockFormat, bool]],
    name: str,
    read: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Return a weight of an offloaded layer as `moe` computes with it.

    Rounding takes many times as long as reading, so that what it gave is kept.
    """
    if name not in stored:
        return read()
    form, transposed = stored[name]
    inputs = ("rounded", moe.checkpoint_fingerprint, name, form)
    return _restored(
        moe.passes.recall(inputs, lambda: _packed(read(), form, transposed)), form, transposed
    )


def _rounded(weight: torch.Tensor, form: BlockFormat, transposed: bool) -> torch.Tensor:
    return _restored(_packed(weight, form, transposed), form, transposed)


def _packed(weight: torch.Tensor, form: BlockFormat, transposed: bool) -> list[torch.Tensor]:
    """Return values and scales."""
    rows = weight.mT if transposed else weight
    return [torch.from_numpy(part) for part in quantize(rows.numpy(), form)]


def _restored(packed: Sequence[torch.Tensor], form: BlockFormat, transposed: bool) -> torch.Tensor:
    values, scales = (part.numpy() for part in packed)
    # PyTorch's fresh memory is several times as fast as numpy's where pages are large.
    rounded = torch.empty(*scales.shape[:-1], scales.shape[-1] * form.block)
    dequantize(values, scales, form, out=rounded.numpy())
    return rounded.mT.contiguous() if transposed else rounded


@contextlib.contextmanager
def float_weights(moe: MoeModel) -> Iterator[None]:
    """Give the model the weights of its checkpoint while the block lasts."""
    if moe.offloading is not None:
        moe.offloading.source.transform = None
    for name, parameter in _resident(moe, _stored(moe)):
        parameter.copy_(moe.reader.read(name, parameter.dtype))
    try:
        yield
    finally:
        _round_weights(moe)


def _resident(
    moe: MoeModel, stored: Mapping[str, tuple[BlockFormat, bool]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the quantised parameters that are in memory, to be written to."""
    for name, parameter in moe.model.named_parameters():
        if name in stored and not parameter.is_meta:
            yield name, parameter.detach()


def _stored(moe: MoeModel) -> dict[str, tuple[BlockFormat, bool]]:
    """Return by name how parameters are stored, and whether rows and columns are swapped."""
    assert moe.quantization is not None
    stored = {name: (form, False) for name, form in moe.quantization.weights.items()}
    chosen = moe.layers if moe.quantization.experts else ()
    for layer, form in zip(chosen, moe.quantization.experts, strict=True):
        module: Any = moe.skeleton.get_submodule(layer.experts_name)
        for leaf in _EXPERT_WEIGHTS:
            stored[f"{layer.experts_name}.{leaf}"] = form, bool(module.is_transposed)
    return stored


@contextlib.contextmanager
def exact_copy(path: Path) -> Iterator[Path]:
    """Yield a copy of a quantised graph whose kernels don't round activations to 8 bits.

    It lies beside the graph, with which it shares its data, and is gone after the block. Load it
    inside: 8-bit experts take the exact path by an environment variable of onnxruntime only.
    """
    model = ir.load(path)
    for node in model.graph:
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    copy = path.with_name(f".exact.{path.name}")
    ir.save(model, copy)
    try:
        with mock.patch.dict(os.environ, {_EXACT_EXPERTS: "fp32"}):
            yield copy
    finally:
        copy.unlink()
