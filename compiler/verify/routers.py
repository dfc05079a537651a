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
        self._layer: int | None = None  # whose router may be running
        self._ran: torch.Tensor | None = None  # of its call, once asked for
        self._layers, self._activations, self._near, self._runs = layers, activations, near, runs

    def enter(self, layer: int | None) -> None:
        """Begin a call of a layer, or end it."""
        self._layer, self._ran = layer, None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in _TOP_K or self._layer is None:
            return found
        return self._choose(found, self._layers[self._layer], *args, **(kwargs or {}))

    def _choose(
        self, found: Any, layer: MoeLayer, input: torch.Tensor, k: int, *_: Any, **__: Any
    ) -> Any:
        if k == input.shape[-1] or not _is_choice(input, k, layer):
            return found
        first = input.topk(k + 1).values
        last = first[..., k - 1 : k]
        unit = last.abs().clamp(min=1)
        leads = (last - first[..., k:]) / unit
        least = leads.nan_to_num(math.inf).min().item()  # of two that are ruled out there is none
        self._activations.lead = min(self._activations.lead, least)
        if self._runs is None:
            return found
        ran = self._ran_in_call(self._runs, input)
        near = (input - last).abs() < self._near * unit
        ids = torch.where(near & ran, input + 2 * self._near * unit, input).topk(k).indices
        return torch.return_types.topk((input.gather(-1, ids), ids))

    def _ran_in_call(self, runs: Runs, scores: torch.Tensor) -> torch.Tensor:
        """Return which experts ran, or which groups of them did, shaped as their scores are."""
        assert self._layer is not None
        if self._ran is None:
            self._ran = runs(self._layer)
        return self._ran.view(*scores.shape, -1).any(-1)


def _is_choice(scores: torch.Tensor, k: int, layer: MoeLayer) -> bool:
    """Whether so many of these scores are a token's experts, or the groups that may have some.

    Scores of groups are a row per token; what is chosen inside groups has an axis more.
    """
    choices = scores.shape[-1]
    if choices == layer.num_experts:
        return k == layer.experts_per_token
    return scores.ndim == 2 and 1 < choices < layer.num_experts and not layer.num_experts % choices


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
    the layer has, or of groups of equal size before it. Routers that choose otherwise are not seen.

    Args:
        model: A causal language model.
        layers: Its MoE layers.
        activations: What is told the least lead.
        near: What lead is a tie.
        runs: Asked once for each call of a layer. Of experts that tie for a router's last places,
            those that ran are chosen first; of groups, those of experts that ran.
    """
    watch = _Watch(layers, activations, near, runs)

    def enter(index: int | None) -> Callable[..., None]:
        def hook(*_: object) -> None:
            watch.enter(index)

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
