"""Some weights a second time: by the safetensors library and transformers, not by the reader.

Where a model's layers are read when they run, or its weights are quantised, everything that is
compared with PyTorch has come through the reader, whose mistakes would then be on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.modeling_utils import LoadStateDictConfig

from alloc_moe.compiler.errors import CheckpointError, VerificationError
from alloc_moe.compiler.model.architectures import weight_conversions
from alloc_moe.compiler.model.quiet import quiet
from alloc_moe.compiler.model.replay import find_decoder_layers
from alloc_moe.compiler.model.skeleton import build_empty

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alloc_moe.compiler.model.checkpoint import Checkpoint
    from alloc_moe.compiler.model.files.headers import StoredTensor
    from alloc_moe.compiler.records import MoeLayer

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_SCALES = re.compile(r"(?:_scale_inv|_scale|\.scale|\.qscale_weight)$")


def check_readings(checkpoint: Checkpoint) -> None:
    """Compare the first and the last MoE layer, of its experts the first and the last.

    Takes about the time, and the memory, of reading these two layers.

    Raises:
        VerificationError: The reader gives other weights than transformers.
    """
    for layer in dict.fromkeys((checkpoint.layers[0], checkpoint.layers[-1])):
        chosen = sorted({0, layer.num_experts - 1})
        with quiet():
            expected = _read_again(checkpoint, layer, chosen)
        for name, other in expected.items():
            own = checkpoint.reader.read(name, other.dtype)
            own = own[chosen] if name.startswith(f"{layer.experts_name}.") else own
            if other.shape != own.shape or not torch.equal(own, other):
                raise VerificationError(
                    f"{name} of {checkpoint.folder} is read in two ways that differ by up to "
                    f"{_difference(own, other)}, so nothing is compiled. If the files aren't being "
                    "changed, please report it with the model's config.json."
                )


def _difference(own: torch.Tensor, other: torch.Tensor) -> str:
    if own.shape != other.shape:
        return f"their shapes, {tuple(own.shape)} and {tuple(other.shape)}"
    return f"{float((own.double() - other.double()).abs().max()):.3g}"


def _read_again(
    checkpoint: Checkpoint, layer: MoeLayer, chosen: list[int]
) -> dict[str, torch.Tensor]:
    """Return the parameters of a decoder layer, with the chosen experts, as transformers loads."""
    model = build_empty(
        checkpoint.config, torch.float32, trust_remote_code=checkpoint.trust_remote_code
    )
    for name, parameter in list(model.get_submodule(layer.experts_name).named_parameters()):
        cut = parameter.new_empty(len(chosen), *parameter.shape[1:])
        model.get_submodule(layer.experts_name).register_parameter(
            name, torch.nn.Parameter(cut, requires_grad=False)
        )
    stack = find_decoder_layers(model, layer)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    prefix = f"{prefix}.{layer.decoder_layer}."
    tensors = _layer_tensors(checkpoint, model, prefix, layer, chosen)
    conversions = weight_conversions(model)
    convert_and_load_state_dict_in_model(
        model, tensors, LoadStateDictConfig(dtype=torch.float32, weight_mapping=conversions)
    )
    found = {name: value for name, value in model.state_dict().items() if name.startswith(prefix)}
    if lacking := [name for name, value in found.items() if value.is_meta]:
        raise VerificationError(
            f"{lacking[0]} of {checkpoint.folder} is loaded by the compiler but not by "
            "transformers, so nothing is compiled. Please report it with the model's config.json."
        )
    return found


def _layer_tensors(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    prefix: str,
    layer: MoeLayer,
    chosen: list[int],
) -> dict[str, torch.Tensor]:
    """Return what a checkpoint stores of a decoder layer, as floats, under its own keys."""
    stored = checkpoint.reader.weights.files.tensors
    conversions = weight_conversions(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state, base = model.state_dict(), model.base_model_prefix
    settings = checkpoint.reader.weights.quantization
    tensors = {}
    for key in stored:
        name = key.removesuffix("_blocks") if settings else key
        target, _ = rename_source_key(name, renamings, converters, base, state)
        if not target.startswith(prefix) or target not in state:
            continue
        expert = _EXPERT.search(name)
        if expert is not None and int(expert[1]) not in chosen:
            continue
        fused = expert is None and target.startswith(f"{layer.experts_name}.")
        rows = chosen if fused else None
        tensors[name] = _floats(stored, key, rows, block=settings.block if settings else None)
    return tensors


def _floats(
    stored: Mapping[str, StoredTensor],
    key: str,
    rows: list[int] | None,
    *,
    block: tuple[int, int] | None,
) -> torch.Tensor:
    value = _get(stored, key, rows)
    if key.endswith("_blocks"):
        scales = _get(stored, f"{key.removesuffix('_blocks')}_scales", rows)
        floats: torch.Tensor = convert_moe_packed_tensors(value, scales, dtype=torch.float32)
        return floats
    if value.dtype.itemsize != 1:
        return value
    stem = key.removesuffix(".weight")
    scale = next(
        other
        for other in stored
        if other.startswith(stem) and _SCALES.fullmatch(other.removeprefix(key).removeprefix(stem))
    )
    return value.float() * _spread(_get(stored, scale, rows), value.shape, block)


def _spread(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int] | None) -> torch.Tensor:
    """Return a scale for every weight."""
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    rows, columns = shape[-2:]
    down, across = block or (rows, columns)
    if scale.shape == (*shape[:-2], -(-rows // down), -(-columns // across)):
        row, column = torch.arange(rows) // down, torch.arange(columns) // across
        return scale[..., row[:, None], column[None, :]]
    return scale.reshape(*scale.shape, *[1] * (len(shape) - scale.ndim))


def _get(stored: Mapping[str, StoredTensor], key: str, rows: list[int] | None) -> torch.Tensor:
    path = stored[key].path
    try:
        with safe_open(str(path), framework="pt") as shard:
            if rows is None:
                tensor: torch.Tensor = shard.get_tensor(key)
                return tensor.clone()
            part: Any = shard.get_slice(key)
            return torch.cat([part[row : row + 1] for row in rows])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} can't be read ({error}). It may be truncated: download it again."
        ) from error
