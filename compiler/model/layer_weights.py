"""Decoder layers without weights, which are read from the checkpoint when a layer runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module

if TYPE_CHECKING:
    from alloc_moe.compiler.model.reader import CheckpointReader


class WeightSource:
    """Where every weight of an offloaded model comes from.

    ``transform``, if set, is given the name of each weight and what reads it, and returns what the
    model shall run with instead. ``on_layer`` is called with 1 after each decoder layer that ran.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self.transform: Callable[[str, Callable[[], torch.Tensor]], torch.Tensor] | None = None
        self.on_layer: Callable[[int], None] = lambda _: None

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight `name` as a new tensor of `dtype` on the CPU."""
        read = functools.partial(self._reader.read, name, dtype)
        return read() if self.transform is None else self.transform(name, read)


class LayerHook(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """Gives a decoder layer its weights while its forward runs, or while it is held."""

    def __init__(self, source: WeightSource, prefix: str) -> None:
        super().__init__()
        self._source = source
        self._prefix = prefix
        self._holders = 0
        self._loaded = False

    def init_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """Remember the layer; called by accelerate."""
        self._module = module
        self._absent = dict(module.named_parameters(remove_duplicate=False))
        return module

    def pre_forward(
        self, module: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Read the weights; called by accelerate."""
        self._load()
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        """Drop the weights; called by accelerate."""
        if not self._holders:
            self._drop()
        return output

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the weights in memory while the block lasts."""
        self._load()
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._drop()

    def _load(self) -> None:
        if self._loaded:
            return
        for name, absent in self._absent.items():
            weight = self._source.read(self._prefix + name, absent.dtype)
            self._set(name, torch.nn.Parameter(weight, requires_grad=False))
        self._loaded = True

    def _drop(self) -> None:
        for name, absent in self._absent.items():
            self._set(name, absent)
        self._loaded = False
        self._source.on_layer(1)

    def _set(self, name: str, parameter: torch.nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self._module.get_submodule(owner), leaf, parameter)


def offload_layer(layer: torch.nn.Module, source: WeightSource, prefix: str) -> None:
    """Let a decoder layer whose parameters are meta tensors read them when it runs.

    Args:
        layer: The decoder layer.
        source: What reads them.
        prefix: What comes before the names of the layer's parameters: ``model.layers.3.``.
    """
    add_hook_to_module(layer, LayerHook(source, prefix))


def is_offloaded(layer: torch.nn.Module) -> bool:
    """Whether a decoder layer's weights are read when it runs."""
    return isinstance(getattr(layer, "_hf_hook", None), LayerHook)


def resident(layer: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """Keep a decoder layer's weights in memory while the block lasts."""
    hook = getattr(layer, "_hf_hook", None)
    return hook.held() if isinstance(hook, LayerHook) else contextlib.nullcontext()
