"""``fisher``: what dropped experts cost the loss, to second order, for all layers in one pass.

S[l, k] = 1/2 E[(g . d_k)^2], in nats per token. d_k is the change of the layer's routed output at
k: minus the weighted outputs of the candidates that are dropped. g is the gradient, at that output,
of the summed loss, with labels drawn from the model's own predictions: the mean of g g^T is then
the Fisher information of the output, and S is close to the divergence that ``kl`` measures.

The gradient of the loss with respect to a candidate's weight is g . f_e, f_e being its expert's
output. So neither g nor any f_e is kept: one number per candidate gives every cost and every size.
With corrections d_k is no sum of these: a weight of zero on each d_k, added to the output, has the
gradient g . d_k. With rounded weights d_k is computed when the gradient g is, and not kept.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.reference.experts import replaced_experts, run_pairs
from alloc_moe.compiler.reference.policies import rank_candidates
from alloc_moe.compiler.sensitivity.bits import Rounded
from alloc_moe.compiler.sensitivity.corrected import Reduced
from alloc_moe.compiler.sensitivity.sums import LayerSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Observe = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""``observe(layer, hidden [T, H], ids [T, K], squares [T, K])``: what enters a layer's experts, its
candidates, and the squares of what each adds to the loss, to first order, at a weight of 1."""

_LOGITS_PER_BATCH = 2**22  # 16 MB in float32


class _Seen(NamedTuple):
    """A layer's input and candidates, and tensors of zeros whose gradients are wanted."""

    hidden: torch.Tensor  # [tokens, hidden]
    weights: torch.Tensor  # [tokens, candidates]
    ids: torch.Tensor  # [tokens, candidates]
    probe: torch.Tensor  # [tokens, candidates]; its gradient is that of the weights
    changes: torch.Tensor | None  # [tokens, k < K], on the changes at k; None without corrections


class FisherRun:
    """Adds up the costs and expert sizes of every MoE layer, some calibration windows at a time.

    Args:
        moe_model: The model.
        reduced: What costs are those of.
        seed: Of the labels.
        observe: Called with what each layer gives.
    """

    def __init__(
        self,
        moe_model: MoeModel,
        reduced: Reduced | Rounded,
        *,
        seed: int,
        observe: Observe | None = None,
    ) -> None:
        self._model = moe_model.model
        self._layers = moe_model.layers
        self._stack = DecoderStack(self._model, self._layers[0])
        self._vocabulary = moe_model.config.get_text_config().vocab_size
        self._reduced = reduced
        self._seed = seed
        self._observe = observe
        self._seen: dict[int, _Seen] = {}

    def add(self, ids: torch.Tensor, first: int, sums: Sequence[LayerSums]) -> float:
        """Add what windows [windows, sequence] give to `sums`.

        Args:
            ids: Token ids.
            first: Which window of the calibration set the first is: labels are drawn per window,
                so that they don't depend on how many windows are run together.
            sums: Of each layer.

        Returns:
            The next-token loss, summed.
        """
        with torch.enable_grad(), _frozen(self._model), self.watching(sums):
            end = self._stack.run(ids, None, start=0, stop=len(self._stack))
            loss, gradient = self.losses(ids, end.detach(), first)
            end.backward(gradient.view_as(end))  # type: ignore[no-untyped-call]
        for index, layer_sums in enumerate(sums):
            self._add_layer(index, layer_sums)
        self._seen.clear()
        return loss

    def watching(self, sums: Sequence[LayerSums]) -> AbstractContextManager[None]:
        """Run the experts as `backward` will; nothing is added to `sums` before that."""
        calls = {
            layer.experts_name: functools.partial(self._watch, index, sums[index])
            for index, layer in enumerate(self._layers)
        }
        return replaced_experts(self._model, calls)

    def backward(
        self,
        ids: torch.Tensor,
        hidden: torch.Tensor,
        gradient: torch.Tensor,
        decoder_layer: int,
        sums: Sequence[LayerSums],
    ) -> torch.Tensor:
        """Add what one decoder layer gives to `sums`; return the gradient at its input.

        Args:
            ids: Token ids [windows, sequence].
            hidden: What enters the decoder layer [windows, sequence, hidden].
            gradient: The gradient at what leaves it, of that shape or [tokens, hidden].
            decoder_layer: Its index; its weights are in memory.
            sums: Of each MoE layer.
        """
        self._seen.clear()  # of the way forward
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad(), _frozen(self._model), self.watching(sums):
            end = self._stack.run(ids, hidden, start=decoder_layer, stop=decoder_layer + 1)
            end.backward(gradient.view_as(end))  # type: ignore[no-untyped-call]
        for index in self._seen:
            self._add_layer(index, sums[index])
        self._seen.clear()
        assert hidden.grad is not None
        return hidden.grad

    def _watch(
        self,
        index: int,
        sums: LayerSums,
        experts: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Run a layer's experts so that the gradient of their weights is found afterwards."""
        ranked, ranked_ids = rank_candidates(weights, ids)
        probe = torch.zeros_like(ranked, requires_grad=True)
        changes = None
        reduced = self._reduced
        if isinstance(reduced, Reduced) and reduced.corrections is not None:
            changes = torch.zeros_like(ranked[:, 1:], requires_grad=True)
        self._seen[index] = _Seen(hidden.detach(), ranked.detach(), ranked_ids, probe, changes)
        # Their activations, most of the model's, are computed again when the gradient gets here.
        outputs: torch.Tensor = checkpoint(
            functools.partial(_outputs, reduced, index),
            experts,
            hidden,
            ranked_ids,
            ranked + probe,
            changes,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        if isinstance(reduced, Rounded) and outputs.requires_grad:
            given = (experts, hidden.detach(), ranked_ids, ranked.detach())
            rounded = functools.partial(reduced.changes, index, *given)
            add = functools.partial(_add_changes, sums, rounded)
            outputs.register_hook(add)  # type: ignore[no-untyped-call]
        return outputs

    def _add_layer(self, index: int, sums: LayerSums) -> None:
        hidden, weights, ids, probe, changes = self._seen[index]
        assert probe.grad is not None
        squares = probe.grad.double().square()
        if self._observe is not None:
            self._observe(index, hidden, ids, squares)
        sums.add_pairs(ids, squares)
        sums.whole += 2 * len(weights)
        if isinstance(self._reduced, Rounded):
            return  # costs were added on the way back
        along = weights.double() * probe.grad  # [tokens, candidates], of the loss
        for k in range(1, weights.shape[1]):  # by definition nothing changes at K
            if changes is None:
                dropped = ~self._reduced.keep(index, k, weights, ids)
                change = (along * dropped).sum(1)
            else:
                assert changes.grad is not None
                change = changes.grad[:, k - 1].double()
            sums.costs[k - 1] += change.square().sum().cpu()

    @torch.enable_grad()
    def losses(
        self, ids: torch.Tensor, end: torch.Tensor, first: int
    ) -> tuple[float, torch.Tensor]:
        """Return the next-token loss, and the gradient at `end` of that of labels drawn here.

        ``end`` [windows, sequence, hidden] are the states at the end, the gradient is
        [tokens, hidden]; ``first`` is as for `add`.
        """
        end = end.flatten(0, 1)
        targets = F.pad(ids[:, 1:], (0, 1), value=-100).flatten()  # the last predicts nothing
        random = [
            np.random.default_rng([self._seed, first + window]).random(ids.shape[1])
            for window in range(len(ids))
        ]
        uniform = torch.from_numpy(np.concatenate(random)).to(end.device)
        loss, gradients = 0.0, []
        size = max(1, _LOGITS_PER_BATCH // self._vocabulary)
        for start in range(0, len(end), size):
            part = slice(start, start + size)
            hidden = end[part].clone().requires_grad_()
            logits = self._stack.head(hidden)
            labels = _draw(logits.detach(), uniform[part])
            F.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
            assert hidden.grad is not None
            gradients.append(hidden.grad)
            found = F.cross_entropy(logits.detach(), targets[part], reduction="none")
            loss += found.double().sum().item()
        return loss, torch.cat(gradients)


def _add_changes(
    sums: LayerSums, changes: Callable[[], Iterator[torch.Tensor]], gradient: torch.Tensor
) -> None:
    """Add what the loss, to first order, changes by with a layer's outputs [tokens, hidden]."""
    with torch.no_grad():
        for choice, change in enumerate(changes()):
            sums.costs[choice] += (change * gradient).sum(1).double().square().sum().cpu()


def _outputs(
    reduced: Reduced | Rounded,
    layer: int,
    experts: torch.nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    changes: torch.Tensor | None,
) -> torch.Tensor:
    """Return the outputs [tokens, hidden], by operations whose gradients add up in fixed order.

    That of indexing rows more than once, which the library's functions do, is added atomically.
    """
    rows = hidden.repeat_interleave(ids.shape[1], 0)
    pairs = run_pairs(experts, rows, ids.flatten(), weights.flatten())
    pairs = pairs.view(*ids.shape, -1)
    outputs = pairs.sum(1)
    if changes is None:
        return outputs
    assert isinstance(reduced, Reduced)
    full, fixed = outputs.detach(), pairs.detach()
    for k in range(1, ids.shape[1]):
        change = reduced.outputs(layer, k, fixed, weights.detach(), ids) - full
        outputs = outputs + changes[:, k - 1, None] * change
    return outputs


def _draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return one token of each distribution, given a number in [0, 1) for each."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    last = torch.full_like(uniform, logits.shape[1] - 1, dtype=torch.long)
    found = torch.searchsorted(cumulative, uniform[:, None], right=True)[:, 0]
    return torch.minimum(found, last)


@contextlib.contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Compute no gradients of parameters while the block lasts."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
