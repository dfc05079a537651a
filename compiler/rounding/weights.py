"""PyTorch models that compute with the weights an artifact stores in 4 or 8 bits.

Everything that a plan is measured on runs with the rounded weights, so that sensitivities,
thresholds and corrections are those of the artifact. Where the plan chooses the bits of each
layer's experts, these stay floats until it has; see `sensitivity.bits`. GPTQ then chose values for
each of the widths before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from alloc_moe.compiler.model.architectures import expert_weights
from alloc_moe.passes.blockwise import BlockFormat, dequantize, quantize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Quantization


def quantized(moe: MoeModel, quantization: Quantization, *, round_experts: bool = True) -> MoeModel:
    """Return the model with every quantised weight replaced by what the artifact computes with.

    Its weights are changed in place; those of offloaded layers whenever they are read. Without
    ``round_experts`` those of experts stay as they are, for `with_expert_formats` to round.
    """
    mark = format_mark(quantization)
    if not round_experts:
        quantization = dataclasses.replace(quantization, experts=())
    quantization = dataclasses.replace(quantization, marks=(mark,))
    moe = dataclasses.replace(moe, quantization=quantization)
    round_weights(moe)
    return moe


def format_mark(quantization: Quantization) -> str:
    """Return what tells a model whose weights and experts are so stored from others."""
    blocks = {form.block for form in (*quantization.experts, *quantization.weights.values())}
    return f"{quantization.dtype}/{'/'.join(map(str, sorted(blocks)))}"


def with_expert_formats(moe: MoeModel, experts: Sequence[BlockFormat]) -> MoeModel:
    """Return the model with its experts, floats until now, rounded to a format a layer.

    In place, as by `quantized`.
    """
    assert moe.quantization is not None
    assert not moe.quantization.experts
    rounded = stored_formats(moe)
    marks = (*moe.quantization.marks, "/".join(str(form.bits) for form in experts))
    quantization = dataclasses.replace(moe.quantization, experts=tuple(experts), marks=marks)
    moe = dataclasses.replace(moe, quantization=quantization)
    round_weights(moe, rounded=rounded)
    return moe


def with_float_experts(moe: MoeModel) -> MoeModel:
    """Return the model with its experts in floats again, as before `with_expert_formats`."""
    assert moe.quantization is not None
    rounded = stored_formats(moe)
    quantization = dataclasses.replace(
        moe.quantization, experts=(), marks=moe.quantization.marks[:-1]
    )
    moe = dataclasses.replace(moe, quantization=quantization)
    stored = stored_formats(moe)
    if moe.offloading is not None:
        moe.offloading.source.transform = functools.partial(_read_rounded, moe, stored)
    for name, parameter in _resident(moe, rounded):
        if name not in stored:
            parameter.copy_(moe.checkpoint.reader.read(name, parameter.dtype))
    return moe


@contextlib.contextmanager
def rounded_experts(moe: MoeModel, name: str, form: BlockFormat) -> Iterator[None]:
    """Let experts, floats until now, compute with rounded weights while the block lasts.

    Takes the memory of their weights once more. Those of an offloaded layer must be in memory.

    Args:
        moe: The model.
        name: The experts module's.
        form: How the weights are stored.
    """
    module: Any = moe.model.get_submodule(name)
    floats = {leaf: getattr(module, leaf) for leaf in expert_weights(module)}
    transposed = bool(module.is_transposed)
    try:
        for leaf, parameter in floats.items():
            chosen = _chosen(moe, f"{name}.{leaf}", form)
            packed = chosen or pack(parameter.detach(), form, transposed)
            values = _restored(packed, form, transposed)
            setattr(module, leaf, torch.nn.Parameter(values, requires_grad=False))
        yield
    finally:
        for leaf, parameter in floats.items():
            setattr(module, leaf, parameter)


def round_weights(moe: MoeModel, *, rounded: Collection[str] = ()) -> None:
    """Round what `moe.quantization` names, except for those in memory that are `rounded`."""
    stored = stored_formats(moe)
    if moe.offloading is not None:
        moe.offloading.source.transform = functools.partial(_read_rounded, moe, stored)
    for name, parameter in _resident(moe, stored):
        if name in rounded:
            continue
        chosen = _chosen(moe, name, stored[name][0])
        if chosen is None:
            round_in_place(parameter, *stored[name])
        else:
            parameter.copy_(_restored(chosen, *stored[name]))


def kept_name(name: str, form: BlockFormat) -> str:
    """Return what a weight's values are kept under, chosen for a format."""
    return f"{name}.int{form.bits}"


def _chosen(moe: MoeModel, name: str, form: BlockFormat) -> list[torch.Tensor] | None:
    """Return packed values and scales of a weight, unless it is rounded to the nearest."""
    return None if moe.chosen is None else moe.chosen.find(kept_name(name, form))


def round_in_place(weight: torch.Tensor, form: BlockFormat, transposed: bool) -> None:
    """Replace a weight's values by the nearest that are stored."""
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
    if (chosen := _chosen(moe, name, form)) is not None:
        return _restored(chosen, form, transposed)
    inputs = ("rounded", moe.checkpoint.fingerprint, name, form)
    return _restored(
        moe.results.recall(inputs, lambda: pack(read(), form, transposed)), form, transposed
    )


def _rounded(weight: torch.Tensor, form: BlockFormat, transposed: bool) -> torch.Tensor:
    return _restored(pack(weight, form, transposed), form, transposed)


def pack(weight: torch.Tensor, form: BlockFormat, transposed: bool) -> list[torch.Tensor]:
    """Return values and scales of a weight rounded to the nearest."""
    rows = weight.mT if transposed else weight
    return [torch.from_numpy(part) for part in quantize(rows.numpy(), form)]


def _restored(packed: Sequence[torch.Tensor], form: BlockFormat, transposed: bool) -> torch.Tensor:
    values, scales = (part.numpy() for part in packed)
    # PyTorch's fresh memory is several times as fast as numpy's where pages are large.
    rounded = torch.empty(*scales.shape[:-1], scales.shape[-1] * form.block)
    dequantize(values, scales, form, out=rounded.numpy())
    return rounded.mT.contiguous() if transposed else rounded


def weight_reader(moe: MoeModel) -> Callable[[str, torch.dtype], torch.Tensor]:
    """Return what reads weights as an artifact rounds them when it is written.

    Those that are rounded to the nearest are as in the checkpoint; of the others it reads what
    rounding to the nearest leaves as it is.
    """
    reader = moe.checkpoint.reader
    if moe.chosen is None:
        return reader.read
    stored = stored_formats(moe)

    def read(name: str, dtype: torch.dtype) -> torch.Tensor:
        chosen = _chosen(moe, name, stored[name][0]) if name in stored else None
        if chosen is None:
            return reader.read(name, dtype)
        return _restored(chosen, *stored[name]).to(dtype)

    return read


def chosen_digest(moe: MoeModel) -> str:
    """Return a digest of all weights that aren't just rounded to the nearest; "" without any."""
    if moe.chosen is None:
        return ""
    stored = stored_formats(moe).items()
    return moe.chosen.digest(kept_name(name, form) for name, (form, _) in stored)


@contextlib.contextmanager
def float_weights(moe: MoeModel) -> Iterator[None]:
    """Give the model the weights of its checkpoint while the block lasts."""
    if moe.offloading is not None:
        moe.offloading.source.transform = None
    for name, parameter in _resident(moe, stored_formats(moe)):
        parameter.copy_(moe.checkpoint.reader.read(name, parameter.dtype))
    try:
        yield
    finally:
        round_weights(moe)


def _resident(
    moe: MoeModel, stored: Mapping[str, tuple[BlockFormat, bool]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the quantised parameters that are in memory, to be written to."""
    for name, parameter in moe.model.named_parameters():
        if name in stored and not parameter.is_meta:
            yield name, parameter.detach()


def stored_formats(moe: MoeModel) -> dict[str, tuple[BlockFormat, bool]]:
    """Return by name how parameters are stored, and whether rows and columns are swapped."""
    assert moe.quantization is not None
    stored = {name: (form, False) for name, form in moe.quantization.weights.items()}
    chosen = moe.layers if moe.quantization.experts else ()
    for layer, form in zip(chosen, moe.quantization.experts, strict=True):
        module: Any = moe.checkpoint.skeleton.get_submodule(layer.experts_name)
        for leaf in expert_weights(module):
            stored[f"{layer.experts_name}.{leaf}"] = form, bool(module.is_transposed)
    return stored
