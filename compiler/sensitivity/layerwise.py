"""``output``, ``fisher`` and ``data-free`` layer by layer, for models larger than memory.

All calibration windows pass a decoder layer before the next is read. For ``fisher`` they go back
the same way: each layer runs again on what entered it, and hands the gradient at its input on to
the layer before. The sums are the same as window by window, added in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.sensitivity.fisher import FisherRun
from alloc_moe.compiler.sensitivity.output import OutputRun
from alloc_moe.compiler.sensitivity.sums import LayerSums, reduced_rows
from alloc_moe.compiler.workspace.states import LayerProgress, LayerStates, state_name

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.workspace.processes import Processes

Batch = tuple[int, torch.Tensor]
"""The index of the first window, and token ids [windows, sequence]."""

Rows = tuple[tuple[float, ...], ...]


class StreamedRun:
    """Sums over this process's batches, layer by layer, added up over processes."""

    def __init__(
        self,
        moe_model: MoeModel,
        batches: Sequence[Batch],
        states: LayerStates,
        processes: Processes,
        advance: Callable[[float], None],
        zeros: Callable[[], list[LayerSums]],
    ) -> None:
        """Prepare to add to the `zeros` of all MoE layers, saying each decoder layer done."""
        self._layers = moe_model.layers
        self._stack = DecoderStack(moe_model.model, moe_model.layers[0])
        self._batches = batches
        self._states = states
        self._processes = processes
        self._advance = advance
        self._zeros = zeros

    def output(self, run: OutputRun) -> tuple[Rows, float]:
        """Return the sums of every layer, and the next-token loss, summed."""
        progress = self._forward(run, self._states.progress() or self._nothing(), keep=False)
        ends = self._states.load(state_name("forward", len(self._stack)))
        pairs = zip(self._batches, ends, strict=True)
        return progress.sums, self._total(sum(run.loss(ids, end) for (_, ids), end in pairs))

    def data_free(self, run: OutputRun, seed: int) -> tuple[Rows, float]:
        """Return the sums of every layer on random inputs; the loss is 0."""
        rows = self._nothing().sums
        for index, layer in enumerate(self._layers):
            sums = self._zeros()
            with self._stack.resident(layer.decoder_layer):
                for first, ids in self._batches:
                    run.add_random_layer(index, ids, first, sums[index], seed=seed)
            rows = reduced_rows(rows, sums, self._processes)
            self._advance(1)
        return rows, 0.0

    def fisher(
        self, run: FisherRun, passed: Callable[[int], None] = lambda _: None
    ) -> tuple[Rows, float]:
        """Return the sums of every layer, and the next-token loss, summed.

        Args:
            run: What is added up.
            passed: Called with each decoder layer that all gradients have passed, before that is
                saved: after a kill it is called again, or all that it did is done.
        """
        progress = self._states.progress() or self._nothing()
        last = len(self._stack)
        if progress.stage == "forward":
            progress = self._forward(run, progress, keep=True)
            losses, gradients = [], []
            ends = self._states.load(state_name("forward", last))
            for (first, ids), end in zip(self._batches, ends, strict=True):
                loss, gradient = run.losses(ids, end, first)
                losses.append(loss)
                gradients.append(gradient)
            total = self._total(sum(losses))
            progress = LayerProgress("backward", last, total, progress.sums)
            self._save(progress, gradients)
        else:
            self._advance(last + last - progress.layer)
        for layer in reversed(range(self._layers[0].decoder_layer, progress.layer)):
            progress = self._backward(run, progress, layer, passed)
        return progress.sums, progress.loss

    def _forward(
        self, run: OutputRun | FisherRun, progress: LayerProgress, *, keep: bool
    ) -> LayerProgress:
        """Run all layers that are left; with `keep` what enters each of them stays."""
        self._advance(progress.layer)
        hidden: list[torch.Tensor] = []
        if progress.layer:
            hidden = self._states.load(state_name("forward", progress.layer))
        for layer in range(progress.layer, len(self._stack)):
            sums = self._zeros()
            inputs = [
                (ids, hidden[batch] if layer else None)
                for batch, (_, ids) in enumerate(self._batches)
            ]
            if keep and layer == 0:
                entering = list(self._stack.stream(inputs, stop=0))
                self._states.save(state_name("forward", 0), entering)
            with torch.no_grad(), run.watching(sums):
                hidden = list(self._stack.stream(inputs, start=layer, stop=layer + 1))
            rows = reduced_rows(progress.sums, sums, self._processes)
            progress = LayerProgress("forward", layer + 1, 0.0, rows)
            self._save(progress, hidden)
            if not keep:
                self._states.drop(state_name("forward", layer))
            self._advance(1)
        return progress

    def _backward(
        self,
        run: FisherRun,
        progress: LayerProgress,
        layer: int,
        passed: Callable[[int], None],
    ) -> LayerProgress:
        """Move the gradients from behind a layer to before it, adding what they say of it."""
        sums = self._zeros()
        entering = self._states.load(state_name("forward", layer))
        gradients = self._states.load(state_name("backward", layer + 1))
        before = []
        with self._stack.resident(layer):
            for (_, ids), hidden, gradient in zip(self._batches, entering, gradients, strict=True):
                before.append(run.backward(ids, hidden, gradient, layer, sums))
        passed(layer)
        rows = reduced_rows(progress.sums, sums, self._processes)
        progress = LayerProgress("backward", layer, progress.loss, rows)
        self._save(progress, before)
        self._states.drop(state_name("forward", layer + 1))
        self._states.drop(state_name("backward", layer + 1))
        self._advance(1)
        return progress

    def _save(self, progress: LayerProgress, tensors: Sequence[torch.Tensor]) -> None:
        self._states.save(state_name(progress.stage, progress.layer), tensors)
        self._total(0.0)  # all processes have saved theirs
        self._states.commit(progress)

    def _total(self, value: float) -> float:
        return self._processes.add(torch.tensor([value], dtype=torch.float64)).item()

    def _nothing(self) -> LayerProgress:
        return LayerProgress("forward", 0, 0.0, tuple(each.row() for each in self._zeros()))
