"""``output``: how much dropped experts change their layer's output, for all layers in one pass.

S[l, k] = E||d_k||^2 / E||y_K||^2, d_k being the change at k of the layer's routed output y.
``data-free``, a baseline, is LExI's (arXiv 2509.02753): the norm of that change, not relative, for
random Gaussian inputs. Of experts with rounded weights d_k is the change from those in floats at K.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F  # noqa: N812

from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.reference.experts import replaced_experts, run_pairs
from alloc_moe.compiler.reference.policies import rank_candidates
from alloc_moe.compiler.sensitivity.bits import Rounded
from alloc_moe.compiler.sensitivity.corrected import Reduced
from alloc_moe.compiler.sensitivity.sums import LayerSums

_LOGITS_PER_BATCH = 2**22  # 16 MB in float32


class OutputRun:
    """Adds up the costs and expert sizes of every MoE layer, some calibration windows at a time."""

    def __init__(self, moe_model: MoeModel, reduced: Reduced | Rounded) -> None:
        self._model = moe_model.model
        self._layers = moe_model.layers
        self._stack = DecoderStack(self._model, self._layers[0])
        self._vocabulary = moe_model.config.get_text_config().vocab_size
        self._reduced = reduced

    def add(self, ids: torch.Tensor, sums: Sequence[LayerSums]) -> float:
        """Add windows [windows, sequence] to `sums`; return the next-token loss, summed."""
        with torch.no_grad(), self.watching(sums):
            return self.loss(ids, self._stack.run(ids, None, start=0, stop=len(self._stack)))

    def watching(self, sums: Sequence[LayerSums]) -> AbstractContextManager[None]:
        """Add what runs while the block lasts to `sums`."""
        calls = {
            layer.experts_name: functools.partial(self._add_layer, index, sums[index], False)
            for index, layer in enumerate(self._layers)
        }
        return replaced_experts(self._model, calls)

    @torch.no_grad()
    def loss(self, ids: torch.Tensor, end: torch.Tensor) -> float:
        """Return the next-token loss, summed, of windows whose states at the end are `end`."""
        end = end.flatten(0, 1)
        targets = F.pad(ids[:, 1:], (0, 1), value=-100).flatten()
        size = max(1, _LOGITS_PER_BATCH // self._vocabulary)
        loss = 0.0
        for start in range(0, len(end), size):
            logits = self._stack.head(end[start : start + size])
            part = F.cross_entropy(logits, targets[start : start + size], reduction="none")
            loss += part.double().sum().item()
        return loss

    def add_random(
        self, ids: torch.Tensor, first: int, sums: Sequence[LayerSums], *, seed: int
    ) -> float:
        """Add as many random inputs as `ids` has tokens, each MoE block on its own; return 0.

        ``first`` is the index of the first window: it and ``seed`` decide what is drawn.
        """
        for index, layer_sums in enumerate(sums):
            self.add_random_layer(index, ids, first, layer_sums, seed=seed)
        return 0.0

    def add_random_layer(
        self, index: int, ids: torch.Tensor, first: int, sums: LayerSums, *, seed: int
    ) -> None:
        """Add random inputs of one MoE block, whose weights are in memory, as `add_random` does."""
        name = self._layers[index].experts_name
        generator = torch.Generator().manual_seed(hash((seed, first, index)))
        width = self._model.config.get_text_config().hidden_size
        hidden = torch.randn(1, ids.numel(), width, generator=generator).to(ids.device)
        call = functools.partial(self._add_layer, index, sums, True)
        with torch.no_grad(), replaced_experts(self._model, {name: call}):
            self._model.get_submodule(self._layers[index].name)(hidden)

    def _add_layer(
        self,
        index: int,
        sums: LayerSums,
        absolute: bool,
        experts: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        ranked, ranked_ids = rank_candidates(weights, ids)
        tokens, candidates = ranked.shape
        inputs = hidden.repeat_interleave(candidates, 0)
        pairs = run_pairs(experts, inputs, ranked_ids.flatten(), torch.ones_like(ranked).flatten())
        outputs = pairs.view(tokens, candidates, -1).double()
        sums.add_pairs(ranked_ids, outputs.square().sum(-1))
        weighted = outputs * ranked[..., None].double()
        # [tokens, candidates, candidates]: the square of any sum of outputs is a sum of these.
        products = weighted @ weighted.transpose(1, 2)
        sums.whole += tokens if absolute else products.sum().cpu()
        if isinstance(self._reduced, Rounded):
            changes = self._reduced.changes(index, experts, hidden, ranked_ids, ranked)
            for choice, change in enumerate(changes):
                sums.costs[choice] += change.double().square().sum().cpu()
            return weighted.sum(1).to(hidden.dtype)
        for k in range(1, candidates):  # by definition nothing changes at K
            if self._reduced.corrections is None:
                dropped = (~self._reduced.keep(index, k, ranked, ranked_ids)).double()
                squares = torch.einsum("tj,tjk,tk->", dropped, products, dropped)
            else:
                given = self._reduced.outputs(index, k, weighted.to(hidden), ranked, ranked_ids)
                squares = (given - weighted.sum(1)).square().sum()
            sums.costs[k - 1] += squares.cpu()
        return weighted.sum(1).to(hidden.dtype)
