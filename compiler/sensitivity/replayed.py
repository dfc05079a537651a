"""``kl`` and ``ppl-suffix``: what comes out of the model when one layer has fewer experts.

Nothing before layer l changes, so what enters its decoder layer is kept and only the rest replayed.
A layer's experts run once; their outputs summed for every k go through the rest of the model as one
batch. Without redistribution and correction those are prefix sums, in rank order, of those at K.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812

from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.records import Metric
from alloc_moe.compiler.reference.experts import (
    ExpertsCall,
    library_experts,
    replaced_experts,
    run_pairs,
)
from alloc_moe.compiler.reference.policies import rank_candidates
from alloc_moe.compiler.workspace.processes import Processes

if TYPE_CHECKING:
    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.sensitivity.corrected import Reduced

_TOKENS_PER_BATCH = 4096  # of all k together: bounds the memory of activations
_LOGITS_PER_BATCH = 2**22  # of all k together, 16 MB in float32
_FEWEST_POSITIONS = 32  # of a batch of logits, however large the vocabulary
_ALONE = Processes()
_REPLAY_TOLERANCE = 1e-3  # relative; a wrong replay is off by far more


class ReplayRun:
    """A model and its calibration windows, with what enters one decoder layer."""

    def __init__(
        self,
        moe_model: MoeModel,
        calibration: CalibrationSet,
        *,
        metric: Metric,
        reduced: Reduced | None,
        processes: Processes = _ALONE,
    ) -> None:
        """Prepare to measure layers as `reduced` gives them; None keeps each token's first k.

        Each of the `processes` runs a share of the windows.
        """
        self._model = moe_model.model
        self._layers = moe_model.layers
        self._metric = metric
        self._reduced = reduced
        self._stack = DecoderStack(self._model, self._layers[0])
        self._vocabulary = moe_model.config.get_text_config().vocab_size
        most = max(layer.experts_per_token for layer in self._layers)
        windows = max(1, _TOKENS_PER_BATCH // (most * calibration.sequence_length))
        ids = torch.from_numpy(calibration.ids).to(self._model.device)
        windows = min(windows, max(1, len(ids) // processes.size))
        self._batches = processes.share(torch.split(ids, windows))  # of [windows, sequence]
        self._processes = processes
        self._tokens = len(ids) * calibration.sequence_length
        self._targets = self._tokens - len(ids)  # predicted: all but the first of each window
        self._at = 0
        self._checked = False
        self._entering: list[torch.Tensor] = []  # hidden states at decoder layer `_at`, per batch
        self._full: list[torch.Tensor] = []  # hidden states at the end of the full model, per batch

    @property
    def decoder_layers(self) -> int:
        """The number of decoder layers."""
        return len(self._stack)

    def enter(self, layer: int) -> float:
        """Run the full model once and keep what enters MoE layer `layer`; return the mean loss."""
        self._at = self._layers[layer].decoder_layer
        loss = torch.zeros(1, dtype=torch.float64)
        with replaced_experts(self._model, {}):
            inputs = ((ids, None) for ids in self._batches)
            self._entering = list(self._stack.stream(inputs, stop=self._at))
            entered = zip(self._batches, self._entering, strict=True)
            self._full = list(self._stack.stream(entered, start=self._at))
            for ids, full in zip(self._batches, self._full, strict=True):
                loss += self._losses(ids, full[None])
        return self._processes.add(loss).item() / self._targets

    def measure(self, layer: int, advance: Callable[[float], None]) -> tuple[float, ...]:
        """Return the costs of MoE layer `layer` for k = 1..K."""
        self._go_to(self._layers[layer].decoder_layer)
        ks = self._measured_ks(layer)
        sums = torch.zeros(len(ks), dtype=torch.float64)
        work = self.operations(layer) / len(self._batches)
        if not (self._checked and self._stack.offloaded):  # there it reads all later layers
            self._check_replay(layer)
        for batch, hidden in enumerate(self._replay(layer, ks) if ks else ()):
            if self._metric == "kl":
                sums += self._divergences(hidden, self._full[batch])
            else:
                sums += self._losses(self._batches[batch], hidden)
            advance(work)
        sums = self._processes.add(sums)
        if self._metric == "kl":  # by definition nothing changes at K
            return (*(sums / self._tokens).tolist(), 0.0)
        return tuple((sums / self._targets).exp().tolist())

    def operations(self, layer: int) -> float:
        """Return the GFLOP of measuring MoE layer `layer`, roughly: those of the weights."""
        first = self._layers[layer].decoder_layer
        variants = len(self._measured_ks(layer))
        top_1 = self._metric == "ppl-suffix"
        active = sum(
            self._active_parameters(index, top_1=top_1 and index > first)
            for index in range(first, len(self._stack))
        )
        head = self._model.get_output_embeddings()
        head_parameters = 0 if head is None else head.weight.numel()
        per_token = variants * active + (variants + (not top_1)) * head_parameters
        return 2e-9 * per_token * sum(ids.numel() for ids in self._batches)

    def _active_parameters(self, index: int, *, top_1: bool) -> float:
        parameters = sum(p.numel() for p in self._stack[index].parameters())
        for layer in self._layers:
            if layer.decoder_layer == index:
                experts = self._model.get_submodule(layer.experts_name).parameters()
                idle = layer.num_experts - (1 if top_1 else layer.experts_per_token)
                parameters -= sum(p.numel() for p in experts) * idle // layer.num_experts
        return parameters

    def _measured_ks(self, layer: int) -> list[int]:
        last = self._layers[layer].experts_per_token
        return list(range(1, last if self._metric == "kl" else last + 1))

    def _go_to(self, decoder_layer: int) -> None:
        """Move the kept hidden states on to a later decoder layer."""
        with replaced_experts(self._model, {}):
            entering = zip(self._batches, self._entering, strict=True)
            moved = self._stack.stream(entering, start=self._at, stop=decoder_layer)
            for batch, hidden in enumerate(moved):
                self._entering[batch] = hidden
        self._at = decoder_layer

    def _replay(self, layer: int, ks: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield, per batch, the states at the end [ks, windows, sequence, hidden] for each k."""
        calls: dict[str, ExpertsCall] = {
            self._layers[layer].experts_name: functools.partial(_prefix_sums, ks)
            if self._reduced is None
            else functools.partial(_reduced_sums, ks, self._reduced, layer)
        }
        if self._metric == "ppl-suffix":
            calls |= {later.experts_name: _top_1 for later in self._layers[layer + 1 :]}
        inputs = (
            (ids.repeat(len(ks), 1), _repeat(hidden, len(ks)))
            for ids, hidden in zip(self._batches, self._entering, strict=True)
        )
        with replaced_experts(self._model, calls):
            for hidden in self._stack.stream(inputs, start=self._at):
                yield hidden.view(len(ks), -1, *hidden.shape[1:])

    def _check_replay(self, layer: int) -> None:
        """Replay the full model from `layer` on; layers may depend on more than their input."""
        name = self._layers[layer].experts_name
        prefix_sums = functools.partial(_prefix_sums, [self._layers[layer].experts_per_token])
        full = self._full[0]
        with replaced_experts(self._model, {name: prefix_sums}):
            replayed = self._stack.run(
                self._batches[0], self._entering[0], start=self._at, stop=len(self._stack)
            )
        if (replayed - full).abs().max() > _REPLAY_TOLERANCE * full.abs().max():
            raise UnsupportedModelError(
                f"{self._model.config.model_type} can't be profiled: its decoder layers from "
                f"{self._at} on don't depend on that layer's input alone. Use uniform allocation."
            )
        self._checked = True

    def _divergences(self, hidden: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        """Return the KL divergences [ks], summed over tokens, of states [ks, ..., hidden]."""
        stacked = torch.cat([full[None], hidden]).flatten(1, 2)  # [1 + ks, positions, hidden]
        sums = torch.zeros(len(hidden), dtype=torch.float64)
        for _, logits in self._logits(stacked):
            log_p = logits[0].log_softmax(-1)
            p = log_p.exp()
            for index, logits_q in enumerate(logits[1:]):
                difference = log_p - logits_q.log_softmax(-1)
                sums[index] += difference.mul_(p).sum(-1).double().sum().cpu()
        return sums

    def _losses(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the next-token losses [ks], summed over windows, of states [ks, ..., hidden]."""
        targets = F.pad(ids[:, 1:], (0, 1), value=-100).flatten()  # the last predicts nothing
        sums = torch.zeros(len(hidden), dtype=torch.float64)
        for positions, logits in self._logits(hidden.flatten(1, 2)):
            for index, logits_k in enumerate(logits):
                loss = F.cross_entropy(logits_k, targets[positions], reduction="none")
                sums[index] += loss.double().sum().cpu()
        return sums

    def _logits(self, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield logits [variants, some positions, vocabulary] of [variants, positions, hidden]."""
        variants, positions = hidden.shape[:2]
        size = max(_FEWEST_POSITIONS, _LOGITS_PER_BATCH // (variants * self._vocabulary))
        for start in range(0, positions, size):
            part = slice(start, min(start + size, positions))
            logits = self._stack.head(hidden[:, part].flatten(0, 1))
            yield part, logits.view(variants, -1, logits.shape[1])


def _prefix_sums(
    ks: Sequence[int],
    experts: torch.nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Return the outputs at each k of inputs that are the same len(ks) times over."""
    tokens = len(hidden) // len(ks)
    ranked, ranked_ids = rank_candidates(weights[:tokens], ids[:tokens])
    most = max(ks)
    inputs = hidden[:tokens].repeat_interleave(most, 0)
    pairs = run_pairs(experts, inputs, ranked_ids[:, :most].flatten(), ranked[:, :most].flatten())
    sums = pairs.view(tokens, most, -1).cumsum(1)  # [tokens, k, hidden]
    return torch.cat([sums[:, k - 1] for k in ks])


def _reduced_sums(
    ks: Sequence[int],
    reduced: Reduced,
    layer: int,
    experts: torch.nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Return the outputs at each k of inputs that are the same len(ks) times over."""
    tokens, candidates = len(hidden) // len(ks), ids.shape[1]
    ranked, ranked_ids = rank_candidates(weights[:tokens], ids[:tokens])
    inputs = hidden[:tokens].repeat_interleave(candidates, 0)
    pairs = run_pairs(experts, inputs, ranked_ids.flatten(), ranked.flatten())
    pairs = pairs.view(tokens, candidates, -1)
    return torch.cat([reduced.outputs(layer, k, pairs, ranked, ranked_ids) for k in ks])


def _top_1(
    experts: torch.nn.Module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    ranked, ranked_ids = rank_candidates(weights, ids)
    return library_experts(experts, hidden, ranked_ids[:, :1], ranked[:, :1])


def _repeat(hidden: torch.Tensor, times: int) -> torch.Tensor:
    return hidden.repeat(times, *[1] * (hidden.dim() - 1))
