"""A checkpoint's tensors under the names of the model's parameters, read one at a time.

transformers 5 fuses and renames tensors while it loads: `layers.0.mlp.experts.7.up_proj.weight`
becomes a slice of `layers.0.mlp.experts.gate_up_proj`. The reader applies the same conversion to
single parameters, so that a graph's weights can be written without the model being in memory.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import (
    SkipParameters,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from alloc_moe.compiler.errors import CheckpointError
from alloc_moe.compiler.model.architectures import weight_conversions
from alloc_moe.compiler.model.quiet import first_line
from alloc_moe.compiler.model.skeleton import parameter_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alloc_moe.compiler.model.files.stored import StoredWeights

_WRAPPERS = {
    "_orig_mod.": "torch.compile wraps them: save model._orig_mod instead",
    "base_model.model.": "PEFT wraps them: merge_and_unload() the model and save that",
    "module.": "DataParallel wraps them: save model.module instead",
    "_fsdp_wrapped_module.": "FSDP wraps them: save the model's full state",
}


@dataclass(frozen=True)
class _Source:
    """Where a parameter comes from: checkpoint keys, and the conversion that joins them."""

    keys: tuple[tuple[str, str], ...]  # (pattern, checkpoint key)
    converter: WeightConverter | None
    first_target: str


class CheckpointReader:
    """Reads single parameters of `model` from a checkpoint's safetensors files.

    ``unread`` are the tensors that no parameter is made of.

    Args:
        weights: The checkpoint's tensors.
        model: The model's structure; its weights are not used and may be meta tensors.

    Raises:
        CheckpointError: Parameters have no source in the checkpoint, or none of their type or
            shape.
    """

    def __init__(self, weights: StoredWeights, model: PreTrainedModel) -> None:
        self.weights = weights
        self._model = model
        self._sources = self._map_sources()
        self._add_tied_names()
        missing = set(model.state_dict()) - set(self._sources)
        if missing:
            raise CheckpointError(
                f"The checkpoint {weights.files.folder} lacks {len(missing)} weights that "
                f"{type(model).__name__} needs, {min(missing, key=dot_natural_key)} among them. "
                f"{_what_is_there(weights)}"
            )
        read = {key for source in self._sources.values() for _, key in source.keys}
        self.unread = sorted(set(weights) - read, key=dot_natural_key)

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the parameter `name` as a new tensor of `dtype` on the CPU."""
        source = self._sources[name]
        loads = [
            (pattern, key, functools.partial(self.weights.load, key))
            for pattern, key in source.keys
        ]
        stored = self._tied.get(name, name)
        return self._convert(source, loads)[stored].to(dtype).contiguous()

    def keys_of(self, name: str) -> tuple[str, ...]:
        """Return the tensors that a parameter is made of."""
        return tuple(key for _, key in self._sources[name].keys)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def _convert(
        self, source: _Source, loads: Sequence[tuple[str, str, Callable[[], torch.Tensor]]]
    ) -> dict[str, torch.Tensor]:
        if source.converter is None:
            return {source.first_target: loads[0][2]()}
        converter = copy.deepcopy(source.converter)
        for pattern, key, load in loads:
            converter.add_tensor(source.first_target, key, pattern, load)
        converted = converter.convert(
            source.first_target, model=self._model, config=self._model.config
        )
        return {
            name: value[0] if isinstance(value, list) else value
            for name, value in converted.items()
        }

    def _convert_shapes(self, source: _Source) -> dict[str, torch.Tensor]:
        """Return what a conversion gives, as meta tensors."""
        shapes = self.weights.shapes
        metas = [
            (pattern, key, functools.partial(torch.empty, shapes[key], device="meta"))
            for pattern, key in source.keys
        ]
        try:
            return self._convert(source, metas)
        except (RuntimeError, ValueError, TypeError, LookupError, SkipParameters) as error:
            first = source.keys[0][1]
            raise CheckpointError(
                f"The checkpoint's {first} of shape {tuple(shapes[first])} and the "
                f"{len(source.keys) - 1} tensors like it can't be joined into "
                f"{source.first_target} ({first_line(error)}). Weights and config.json don't "
                "belong together."
            ) from error

    def _map_sources(self) -> dict[str, _Source]:
        """Mirror transformers' convert_and_load_state_dict_in_model, without loading anything."""
        transforms = weight_conversions(self._model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        by_pattern = {
            pattern: converter for converter in converters for pattern in converter.source_patterns
        }
        state = self._model.state_dict()
        prefix = self._model.base_model_prefix
        grouped: dict[str, list[tuple[str, str]]] = {}
        used: dict[str, WeightConverter | None] = {}
        for key in sorted(self.weights, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if target not in state and key in state:
                target, pattern = key, None
            if target in state:
                self._check_type(key, target, state[target])
                grouped.setdefault(target, []).append((pattern or key, key))
                # As there, the first key decides if a checkpoint holds a weight in two ways.
                used.setdefault(target, by_pattern[pattern] if pattern is not None else None)
        sources: dict[str, _Source] = {}
        for first, keys in grouped.items():
            source = _Source(tuple(keys if used[first] else keys[:1]), used[first], first)
            for name, value in self._convert_shapes(source).items():
                if name not in state or value.shape != state[name].shape:
                    expected = tuple(state[name].shape) if name in state else "no such weight"
                    raise CheckpointError(
                        f"The checkpoint's {keys[0][1]} gives {name} the shape "
                        f"{tuple(value.shape)}, config.json asks for {expected}. "
                        "Weights and config.json don't belong together."
                    )
                sources[name] = source
        return sources

    def _add_tied_names(self) -> None:
        """Let every name of a shared parameter be read; checkpoints store only one of them."""
        self._tied: dict[str, str] = {}
        for group in parameter_names(self._model):
            stored = [name for name in group if name in self._sources]
            for name in group if stored else ():
                if name not in self._sources:
                    self._tied[name] = stored[0]
                    self._sources[name] = self._sources[stored[0]]

    def _check_type(self, key: str, name: str, parameter: torch.Tensor) -> None:
        """Refuse numbers that aren't the weights themselves: nothing would say so later."""
        if parameter.is_floating_point() == self.weights.holds_floats(key):
            return
        wanted = "a float" if parameter.is_floating_point() else "a whole number"
        told = self.weights.quantization
        raise CheckpointError(
            f"{key} is {self.weights.described(key)}, but {name} is {wanted}, and config.json "
            f"{'names no quantization_config' if told is None else f'says {told.method}'}, which "
            "doesn't tell how to read it. Give the original config.json, or the model in bfloat16."
        )


def differently_tied(model: PreTrainedModel, reader: CheckpointReader) -> bool:
    """Whether parameters that the model shares are stored apart, with different values."""
    for group in parameter_names(model):
        stored = {reader.keys_of(name): name for name in group if name in reader}
        if len(stored) > 1:
            first, *others = (reader.read(name, torch.float32) for name in stored.values())
            if not all(torch.equal(first, other) for other in others):
                return True
    return False


def _what_is_there(weights: StoredWeights) -> str:
    """Say what may have happened to the names of a checkpoint's tensors."""
    for prefix, cause in _WRAPPERS.items():
        if all(name.startswith(prefix) for name in weights):
            return f"All its tensors begin with {prefix}, as {cause}."
    some = ", ".join(sorted(weights, key=dot_natural_key)[:2])
    return (
        f"It has {len(weights.shapes)} tensors, such as {some}. "
        "Is it complete, and of the architecture that config.json names?"
    )
