"""Plan -> corrections: change the kept experts so that they make up for the dropped ones.

Per MoE layer, least squares on the calibration tokens: the routed output under the plan, scaled
and shifted, shall bring the hidden states back to the full model's. ``gain`` fits one factor;
``affine`` a factor per dimension and a shift per expert, which enters with the router's weight for
that expert: which experts run tells a good part of what the others would have added. Both fold into
the experts' ``down`` projection and its bias.

Layers are fitted in their order, on the hidden states that the layers before, already corrected,
leave. An error counts by the size of the hidden states it is added to, which the next norm divides
by. Then each layer is tried without its correction, all others having theirs: one that raises the
loss on the calibration text by more than chance is dropped, and all of them if together they raise
it at all. A stricter test per layer was tried: on the bundled models it dropped corrections whose
small effect it couldn't see, and lost up to half of what they gain on held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from alloc_moe.compiler.correction.sums import CorrectionSums
from alloc_moe.compiler.correction.trials import CorrectionTrials, Running
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.records import Correction, CorrectionMode
from alloc_moe.compiler.reference.experts import correct, replaced_experts, run_kept
from alloc_moe.compiler.reference.policies import POLICIES, adjust_weights, rank_candidates
from alloc_moe.compiler.reference.token_sizes import for_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator


_TOKENS_PER_BATCH = 4096
_TRIED_TOKENS = 8192
_TINY = 1e-30
_STANDARD_ERRORS = 2.0
_ADDED_AS_IT_IS = 1e-3  # relative error allowed of a shift that reaches the hidden states


@dataclass(frozen=True)
class Corrections:
    """One correction per MoE layer, None where none helped.

    ``kinds`` names what each layer got. The losses, in nats per token, are those of the plan on the
    first ``tokens`` calibration tokens, without and with the corrections.
    """

    layers: tuple[Correction | None, ...]
    kinds: tuple[CorrectionMode, ...]
    loss_without: float
    loss_with: float
    tokens: int

    def to_plan(self, mode: CorrectionMode) -> dict[str, object]:
        """Return the plan's ``correction`` entry."""
        return {
            "mode": mode,
            "layers": list(self.kinds),
            "loss_without": self.loss_without,
            "loss_with": self.loss_with,
            "tokens": self.tokens,
        }


@torch.inference_mode()
def fit_corrections(
    moe: MoeModel,
    ids: torch.Tensor,
    running: Running,
    *,
    mode: CorrectionMode,
    advance: Callable[[int], None] = lambda n: None,
) -> Corrections:
    """Return what brings the plan's hidden states closest to the full model's.

    Args:
        moe: The model, in float32.
        ids: Calibration windows [windows, sequence], each a pool of its own.
        running: The plan.
        mode: ``gain`` or ``affine``.
        advance: Called with 1 after each of the two visits to a layer.
    """
    run = _Run(moe, ids, running)
    trials = run.trials
    fitted: list[dict[CorrectionMode, Correction | None]] = []
    for layer in range(len(moe.layers)):
        fitted.append({"none": None, mode: run.fit(layer, mode)})
        advance(1)
    without = trials.losses([None] * len(fitted))
    kinds = [mode] * len(fitted)
    best = trials.losses([given[mode] for given in fitted], keep=True)
    for layer in reversed(range(len(fitted))):
        tried = [*kinds[:layer], "none", *kinds[layer + 1 :]]
        corrections = [given[kind] for given, kind in zip(fitted, tried, strict=True)]
        losses = trials.losses(corrections, start=layer)
        if _is_more(best, losses):
            kinds, best = tried, losses
        advance(1)
    if best.mean() > without.mean():
        kinds, best = ["none"] * len(fitted), without
    layers = tuple(given[kind] for given, kind in zip(fitted, kinds, strict=True))
    means = float(without.mean()), float(best.mean())
    return Corrections(layers, tuple(kinds), *means, run.tokens)


def _is_more(losses: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether the mean of paired losses [tokens] is above the other's by more than chance."""
    difference = losses - others
    error = difference.std(correction=0) / math.sqrt(len(difference))
    return bool(difference.mean() > _STANDARD_ERRORS * error)


@dataclass
class _Stream:
    """Windows, and their hidden states before a decoder layer: the full model's and the plan's."""

    ids: torch.Tensor  # [windows, sequence]
    full: torch.Tensor | None = None
    plan: torch.Tensor | None = None
    full_next: torch.Tensor | None = None  # after the layer, once that is known


class _Run:
    """The model cut before some decoder layer, with the hidden states of all windows there."""

    def __init__(self, moe: MoeModel, ids: torch.Tensor, running: Running) -> None:
        self._moe = moe
        self._running = running
        self._stack = DecoderStack(moe.model, moe.layers[0])
        self._at = 0
        self._skipped: Sequence[object] | None = None  # where the states of fitted layers are
        size = max(1, _TOKENS_PER_BATCH // ids.shape[1])
        self._streams = [_Stream(part) for part in torch.split(ids, size)]
        tried = ids[: max(1, _TRIED_TOKENS // ids.shape[1])]
        self.tokens = tried.numel()
        self.trials = CorrectionTrials(moe, tried, running, tokens_per_batch=_TOKENS_PER_BATCH)

    def fit(self, layer: int, mode: CorrectionMode) -> Correction:
        """Return the correction of the next layer, and move all hidden states past it."""
        passes = self._moe.results
        ids = [stream.ids for stream in self._streams]
        inputs = [
            (what, self._moe.fingerprint, ids, self._running, mode, layer + offset)
            for what, offset in (("correction", 0), ("states", 0), ("states", -1))
        ]
        if (found := passes.find(inputs[0])) is not None:
            scale, bias = found
            self._skipped = inputs[1]
            return Correction(scale.numpy(), bias.numpy() if mode == "affine" else None)
        self._resume(layer)
        self._go_to(layer)
        with self._stack.resident(self._at):
            sums = self._measure(layer, per_expert=mode == "affine")
            correction = sums.affine() if mode == "affine" else sums.gain()
            self._enter_next(layer, correction)
        states = [part for s in self._streams for part in (s.full, s.plan) if part is not None]
        passes.keep(inputs[1], states)
        arrays = (correction.scale, correction.bias if mode == "affine" else np.zeros(0, "f4"))
        passes.keep(inputs[0], [torch.from_numpy(array) for array in arrays])
        passes.forget(inputs[2])
        return correction

    def _resume(self, layer: int) -> None:
        """Take up the hidden states that were saved after the layer before, if it was skipped."""
        if self._skipped is None:
            return
        states = iter(self._moe.results.find(self._skipped) or ())
        for stream in self._streams:
            stream.full, stream.plan = next(states), next(states)
        self._at = self._moe.layers[layer - 1].decoder_layer + 1
        self._skipped = None

    def _measure(self, layer: int, *, per_expert: bool) -> CorrectionSums:
        """Return the sums that a correction of `layer` is fitted with."""
        on_stream = self._reaches_the_stream(layer)
        sums = CorrectionSums(self._moe.layers[layer].num_experts if per_expert else 0)
        for stream in self._streams:
            tap = _Tap(self._running, layer, stream.ids.shape[1], run_all=not on_stream)
            plan = self._step(stream.ids, stream.plan, layer, tap)
            stream.full_next = self._step(stream.ids, stream.full, layer)
            states = stream.full_next.flatten(0, 1)
            missing = states - plan.flatten(0, 1) if on_stream else tap.full - tap.outputs
            importance = 1 / states.square().mean(1).clamp(min=_TINY)
            sums.add(tap.outputs, tap.ids, tap.weights, missing, importance)
        return sums

    def _enter_next(self, layer: int, correction: Correction | None) -> None:
        """Move all hidden states past `layer`, corrected."""
        for stream in self._streams:
            full = stream.full_next
            if full is None:
                full = self._step(stream.ids, stream.full, layer)
            tap = _Tap(self._running, layer, stream.ids.shape[1], correction=correction)
            stream.plan = self._step(stream.ids, stream.plan, layer, tap)
            stream.full, stream.full_next = full, None
        self._at += 1

    def _go_to(self, layer: int) -> None:
        """Move all hidden states to before `layer`, over decoder layers without experts."""
        decoder_layer = self._moe.layers[layer].decoder_layer
        if self._at == decoder_layer:
            return
        where = {"start": self._at, "stop": decoder_layer}
        pairs = [(s.ids, states) for s in self._streams for states in (s.full, s.plan)]
        ends = self._stack.stream(pairs, **where)
        for stream in self._streams:
            stream.full, stream.plan = next(ends), next(ends)
        self._at = decoder_layer

    def _step(
        self, ids: torch.Tensor, hidden: torch.Tensor | None, layer: int, tap: _Tap | None = None
    ) -> torch.Tensor:
        """Return what leaves the decoder layer of `layer`, whose experts run through `tap`."""
        calls = {} if tap is None else {self._moe.layers[layer].experts_name: tap.call}
        with replaced_experts(self._moe.model, calls):
            return self._stack.run(ids, hidden, start=self._at, stop=self._at + 1)

    def _reaches_the_stream(self, layer: int) -> bool:
        """Whether the routed output is added to the hidden states as it is.

        Then what these lack is what the output lacks. Else (a norm after the experts, say) only the
        output on the plan's own hidden states can be restored.
        """
        stream = self._streams[0]
        ids, hidden = stream.ids[:1], None if stream.plan is None else stream.plan[:1]
        plain = _Tap(self._running, layer, ids.shape[1])
        before = self._step(ids, hidden, layer, plain)
        size = float(plain.outputs.square().mean().sqrt())
        shifted = _Tap(self._running, layer, ids.shape[1], shift=size)
        change = self._step(ids, hidden, layer, shifted) - before
        return bool((change - size).abs().max() <= _ADDED_AS_IT_IS * (size + before.abs().max()))


def _nothing() -> torch.Tensor:
    return torch.empty(0)


@dataclass
class _Tap:
    """Runs a layer's experts under the plan, and keeps what the fit needs of it."""

    running: Running
    layer: int
    window: int  # tokens per window
    correction: Correction | None = None
    shift: float = 0.0
    run_all: bool = False
    outputs: torch.Tensor = field(default_factory=_nothing)  # [T, H] of the kept candidates
    full: torch.Tensor = field(default_factory=_nothing)  # [T, H] of all, with `run_all`
    ids: torch.Tensor = field(default_factory=_nothing)  # [T, K]
    weights: torch.Tensor = field(default_factory=_nothing)  # [T, K], zero where dropped

    def call(
        self,
        experts: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Stand for the experts' forward: an `ExpertsCall`."""
        ranked, self.ids = rank_candidates(weights, ids)
        keep = torch.cat(list(self._masks(ranked, hidden)))
        self.weights = adjust_weights(self.running.weights, ranked, keep)
        self.outputs = run_kept(experts, hidden, self.ids, self.weights, keep)
        if self.run_all:
            self.full = run_kept(experts, hidden, self.ids, ranked, torch.ones_like(keep))
        if self.correction is not None:
            return correct(self.correction, self.outputs, self.ids, self.weights)
        return self.outputs + self.shift

    def _masks(self, ranked: torch.Tensor, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield which candidates run, window by window: each is a call of its own."""
        real = torch.ones(1, self.window, dtype=torch.bool, device=ranked.device)
        policy = POLICIES[self.running.redistribution]
        parameters = self.running.parameters[self.layer]
        windows = (torch.split(part, self.window) for part in (ranked, self.ids, hidden))
        for weights, ids, states in zip(*windows, strict=True):
            yield policy(weights, ids, real, for_tokens(parameters, states)).mask
