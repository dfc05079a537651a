"""Ties among what routers choose, in PyTorch: seen, and taken as an artifact took them.

A plan decides about the candidates that a router gives it. Which these are is a decision as well:
of two experts that are equal but for rounding, one computation takes this and another takes that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alloc_moe.compiler.records import MoeLayer
    from alloc_moe.compiler.reference.experts import Activations

Runs = Callable[[int], torch.Tensor]
"""``runs(layer) -> mask [T, E]``: which experts an artifact ran in a layer's next call."""

_TOP_K = (torch.topk, torch.Tensor.topk)


class _Watch(TorchFunctionMode):
    """Looks on while routers choose, and takes ties as asked."""

    def __init__(
        self,
        layers: Sequence[MoeLayer],
        activations: Activations,
        near: float,
        runs: Runs | None,
    ) -> None:
        super().__init__()
        self.layer: int | None = None  # whose router may be running
        self._layers, self._activations, self._near, self._runs = layers, activations, near, runs

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func not in _TOP_K or self.layer is None:
            return found
        return self._choose(found, self._layers[self.layer], *args, **kwargs)

    def _choose(
        self, found: Any, layer: MoeLayer, input: torch.Tensor, k: int, *_: Any, **__: Any
    ) -> Any:
        experts = input.shape[-1]
        if (experts, k) != (layer.num_experts, layer.experts_per_token) or k == experts:
            return found
        first = input.topk(k + 1).values
        last = first[..., k - 1 : k]
        unit = last.abs().clamp(min=1)
        leads = (last - first[..., k:]) / unit
        least = leads.nan_to_num(math.inf).min().item()  # of two that are ruled out there is none
        self._activations.lead = min(self._activations.lead, least)
        if self._runs is None:
            return found
        assert self.layer is not None
        runs = self._runs(self.layer).view(input.shape)
        near = (input - last).abs() < self._near * unit
        ids = torch.where(near & runs, input + 2 * self._near * unit, input).topk(k).indices
        return torch.return_types.topk((input.gather(-1, ids), ids))


@contextmanager
def watched_routers(
    model: PreTrainedModel,
    layers: Sequence[MoeLayer],
    activations: Activations,
    *,
    near: float,
    runs: Runs | None = None,
) -> Iterator[None]:
    """Watch what routers choose while the block lasts.

    The least lead of a chosen expert over one that was not goes to ``activations.lead``: it is in
    units of the router's score, or a part of that where it is larger than one.

    A router is known by its choice: the ``topk`` of a MoE layer that takes as many of as many as
    the layer has. Routers that choose otherwise are not seen, nor is the choice of a group.

    Args:
        model: A causal language model.
        layers: Its MoE layers.
        activations: What is told the least lead.
        near: What lead is a tie.
        runs: Asked once for each choice. Of experts that tie for a router's last places, those that
            ran are chosen first.
    """
    watch = _Watch(layers, activations, near, runs)

    def enter(index: int | None) -> Callable[..., None]:
        def hook(*_: object) -> None:
            watch.layer = index

        return hook

    with ExitStack() as hooks, watch:
        for index, layer in enumerate(layers):
            module = model.get_submodule(layer.name)
            for handle in (
                module.register_forward_pre_hook(enter(index)),
                module.register_forward_hook(enter(None)),
            ):
                hooks.callback(handle.remove)
        yield
