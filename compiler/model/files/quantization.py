"""How a checkpoint's weights are quantised, as its configuration and the names of tensors say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from alloc_moe.compiler.errors import CheckpointError, UnsupportedModelError
from alloc_moe.compiler.model.files.json_files import shown

_KEY = "quantization_config"
_DEFAULT_BLOCK = (128, 128)  # of transformers, if the configuration names none
_NAMES = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
}
_TENSORS = (
    (r"\.(?:qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.(?:absmax|quant_state\..*|quant_map|SCB)$", "bitsandbytes"),
    (r"\.(?:weight_packed|weight_shape)$", "compressed-tensors"),
    (r"\.(?:weight_scale_2|weight_global_scale)$", "NVFP4"),
    (r"\.(?:W_q|Wq_packed)$", "HQQ"),
)


@dataclass(frozen=True)
class Quantization:
    """What is undone when weights are read.

    ``block`` are the rows and columns that share a scale; None if a tensor or a row of it does.
    """

    method: Literal["fp8", "mxfp4"]
    block: tuple[int, int] | None = None


def read_quantization(settings: Mapping[str, Any]) -> Quantization | None:
    """Return what config.json says of quantised weights; None if they are floats.

    Raises:
        UnsupportedModelError: They are quantised by another method than fp8 and mxfp4.
        CheckpointError: What it says of them makes no sense.
    """
    nested = [settings.get(name) for name in ("text_config", "language_config", "llm_config")]
    found: Any = None
    for part in (settings, *nested):
        if isinstance(part, Mapping):
            if "compression_config" in part:
                raise _refused("compressed-tensors")
            found = part.get(_KEY) if found is None else found
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{_KEY} in config.json is {shown(found)}, not an object. Remove it if the weights "
            "aren't quantised."
        )
    method = found.get("quant_method")
    if any(found.get(name) for name in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"
    if method == "fp8":
        return Quantization("fp8", _block(found))
    if method == "mxfp4":
        return Quantization("mxfp4")
    raise _refused(method)


def check_names(names: Iterable[str]) -> None:
    """Raise UnsupportedModelError if tensors are those of a method that can't be undone here.

    Older checkpoints say so in no config.json.
    """
    for name in names:
        for pattern, method in _TENSORS:
            if re.search(pattern, name):
                raise _refused(method, f"it has the tensor {name[:100]}")


def _block(found: Mapping[str, Any]) -> tuple[int, int] | None:
    block = found.get("weight_block_size", _DEFAULT_BLOCK)
    if block is None:
        return None
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(isinstance(side, int) and 0 < side <= 1 << 20 for side in block)
    ):
        raise CheckpointError(
            f"weight_block_size in {_KEY} is {shown(block)}, not two positive whole numbers. "
            "Take it from the original config.json."
        )
    return block[0], block[1]


def _refused(method: object, why: str = "") -> UnsupportedModelError:
    known = isinstance(method, str) and (bool(why) or method in _NAMES)
    name = _NAMES.get(method, method[:60]) if isinstance(method, str) else shown(method)
    said = name if known else f"quant_method {name}"
    return UnsupportedModelError(
        f"The checkpoint's weights are quantised by {said}{f' ({why})' if why else ''}, which "
        "can't be compiled. Give the model in bfloat16, float16 or float32, or quantised as fp8 "
        "or mxfp4, and choose the artifact's precision by --dtype."
    )
