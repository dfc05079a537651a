"""What a plan means: PyTorch models that activate the experts a plan gives them, and count them.

Verification and evaluation of the original model run it; the graph passes must compute the same.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from alloc_moe.compiler.records import SCORED, Correction, MoeLayer, Redistribution, Weights
from alloc_moe.compiler.reference.policies import (
    POLICIES,
    Kept,
    LayerParameters,
    adjust_weights,
    layer_parameters,
    rank_candidates,
)
from alloc_moe.compiler.reference.token_sizes import for_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.runtime.artifact.plan import AllocationPlan

Watch = Callable[[int, torch.Tensor, torch.Tensor, LayerParameters], None]
"""``watch(layer, weights [T, K], ids [T, K], parameters)``, called with each layer's ranked
candidates, and what the layer is given for these tokens."""

Turn = Callable[[int, torch.Tensor, Kept], torch.Tensor]
"""``turn(layer, ids [T, K], kept) -> mask [T, K]``: which ranked candidates run in place of those
that the policy keeps."""

ExpertsCall = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``call(experts, hidden [T, H], ids [T, K], weights [T, K]) -> [T, H]``, for an experts module."""

_IMPLEMENTATION = "alloc_moe_reference"
_CALL = "_alloc_moe_call"
_PAIRS = 8192  # (token, expert) pairs evaluated at a time


def run_pairs(
    experts: torch.nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Return the weighted outputs of single experts.

    Args:
        experts: Any experts module in the fused layout of transformers.
        hidden: Inputs [pairs, hidden].
        ids: The expert of each row [pairs].
        weights: What each output is multiplied by [pairs].

    Returns:
        [pairs, hidden]; there may be no rows.
    """
    if len(ids) == 0:
        return torch.zeros_like(hidden)
    return library_experts(experts, hidden, ids[:, None], weights[:, None])


@dataclass
class Activations:
    """What a model executed while `allocated` was in force.

    ``executed[l]`` counts the (token, expert) pairs that ran in MoE layer l, ``tokens`` the real
    tokens; ``margin`` is the closest decision of all (see `Kept`). ``lead`` is that of the routers
    themselves, for whoever watches them.
    """

    executed: list[int]
    tokens: int = 0
    margin: float = math.inf
    lead: float = math.inf

    @property
    def per_token(self) -> list[float]:
        """The mean number of experts per real token in each MoE layer."""
        return [count / max(self.tokens, 1) for count in self.executed]


@contextmanager
def allocated(
    model: PreTrainedModel,
    layers: Sequence[MoeLayer],
    parameters: Sequence[LayerParameters],
    *,
    redistribution: Redistribution,
    weights: Weights,
    corrections: Sequence[Correction | None] | None = None,
    watch: Watch | None = None,
    turn: Turn | None = None,
) -> Iterator[Activations]:
    """Let a model run under a plan while the block lasts.

    Real tokens are those of the ``attention_mask [batch, sequence]`` given to the model, all of
    them without one; with a cache, its last columns are the current tokens.

    Args:
        model: A causal language model; call it whole, as ``model(...)`` or ``model.generate(...)``.
        layers: Its MoE layers.
        parameters: What the plan gives each, see `layer_parameters`.
        redistribution: How a layer's activations are shared out.
        weights: Whether the kept experts' weights are scaled up to the sum of all.
        corrections: What the artifact's experts are changed by, per MoE layer; none by default.
        watch: Called before each layer decides.
        turn: Asked after each layer decided.

    Yields:
        The count of what is executed.
    """
    for layer, given in zip(layers, parameters, strict=True):
        most = layer.experts_per_token
        if not 1 <= given.k <= most:
            raise ValueError(f"k is {given.k} in {layer.name}, not in 1..{most}.")
        if redistribution not in SCORED and given.k != int(given.k):
            raise ValueError(f"k is {given.k} in {layer.name}; {redistribution!r} needs it whole.")
    activations = Activations([0] * len(layers))
    call = _Call(activations)
    calls = {
        layer.experts_name: functools.partial(
            _run_allocated, call, index, given, redistribution, weights, correction, watch, turn
        )
        for index, (layer, given, correction) in enumerate(
            zip(layers, parameters, corrections or [None] * len(layers), strict=True)
        )
    }
    order = list(inspect.signature(model.forward).parameters)

    def begin(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.begin(dict(zip(order, args, strict=False)) | kwargs)

    handle = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with replaced_experts(model, calls):
            yield activations
    finally:
        handle.remove()


def under_plan(
    moe: MoeModel,
    plan: AllocationPlan,
    corrections: Sequence[Correction | None] | None = None,
    *,
    price: float | None = None,
    turn: Turn | None = None,
) -> AbstractContextManager[Activations]:
    """Let a model run under a plan as `allocated` does, with what the plan says.

    Args:
        moe: The model.
        plan: The plan.
        corrections: What the artifact's experts are changed by, per MoE layer; none by default.
        price: For plans with the redistribution ``price``: used instead of the plan's own.
        turn: Asked after each layer decided.

    Raises:
        ArtifactError: The plan lacks what its redistribution needs.
    """
    return allocated(
        moe.model,
        moe.layers,
        layer_parameters(plan, price),
        redistribution=cast("Redistribution", plan.redistribution),
        weights=cast("Weights", plan.weights),
        corrections=corrections,
        turn=turn,
    )


@dataclass
class _Call:
    """The forward call that is going on."""

    activations: Activations
    real: torch.Tensor = field(default_factory=lambda: torch.ones(0, 0, dtype=torch.bool))

    def begin(self, arguments: Mapping[str, Any]) -> None:
        inputs = arguments.get("input_ids")
        inputs = arguments["inputs_embeds"] if inputs is None else inputs
        mask = arguments.get("attention_mask")
        if mask is None:
            self.real = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        elif isinstance(mask, torch.Tensor) and mask.dim() == 2:
            self.real = mask[:, -inputs.shape[1] :] != 0
        else:
            raise ValueError(
                "attention_mask must be [batch, sequence] to tell real tokens from pads."
            )
        self.activations.tokens += int(self.real.sum())


def _run_allocated(
    call: _Call,
    index: int,
    parameters: LayerParameters,
    redistribution: Redistribution,
    mode: Weights,
    correction: Correction | None,
    watch: Watch | None,
    turn: Turn | None,
    experts: torch.nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    ranked, ranked_ids = rank_candidates(weights, ids)
    parameters = for_tokens(parameters, hidden)
    if watch is not None:
        watch(index, ranked, ranked_ids, parameters)
    kept = POLICIES[redistribution](ranked, ranked_ids, call.real, parameters)
    keep = kept.mask if turn is None else turn(index, ranked_ids, kept)
    call.activations.executed[index] += int(keep.sum())
    call.activations.margin = min(call.activations.margin, kept.margin)
    adjusted = adjust_weights(mode, ranked, keep)
    outputs = run_kept(experts, hidden, ranked_ids, adjusted, keep)
    return outputs if correction is None else correct(correction, outputs, ranked_ids, adjusted)


def run_kept(
    experts: torch.nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    keep: torch.Tensor,
) -> torch.Tensor:
    """Return the outputs [T, H] of the kept candidates, run for `hidden` [T, H] as pairs.

    ``ids``, ``weights`` and ``keep`` are [T, K].
    """
    if keep.all():
        return library_experts(experts, hidden, ids, weights)
    rows, _ = keep.nonzero(as_tuple=True)  # token by token, best rank first
    outputs = hidden.new_zeros(*keep.shape, hidden.shape[1])  # [tokens, candidates, hidden]
    outputs[keep] = run_pairs(experts, hidden[rows], ids[keep], weights[keep])
    return outputs.sum(1)  # not index_add_, which on a GPU adds in no fixed order


def correct(
    correction: Correction, outputs: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return what corrected experts give where the trained ones give `outputs` [T, H].

    ``ids`` and ``weights`` are [T, K], the weights zero where dropped.
    """
    corrected = outputs * torch.from_numpy(correction.scale).to(outputs.device)
    if correction.bias is None:
        return corrected
    bias = torch.from_numpy(correction.bias).to(outputs.device)
    return corrected + dense_weights(ids, weights, len(bias)) @ bias


def dense_weights(ids: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """Return each token's weight of every expert [T, experts], zero where it has none."""
    return weights.new_zeros(len(ids), experts).scatter_(1, ids, weights)


@contextmanager
def replaced_experts(model: PreTrainedModel, calls: Mapping[str, ExpertsCall]) -> Iterator[None]:
    """Let experts modules run `calls`, by module path, while the block lasts.

    Experts modules that are not named run as in transformers.
    """
    if _IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _dispatch)
    modules = {name: model.get_submodule(name) for name in calls}
    outer = {name: getattr(module, _CALL, None) for name, module in modules.items()}
    implementation = model.get_experts_implementation()
    try:
        for name, module in modules.items():
            setattr(module, _CALL, calls[name])
        model.set_experts_implementation(_IMPLEMENTATION)
        yield
    finally:
        model.set_experts_implementation(implementation)
        for name, module in modules.items():
            setattr(module, _CALL, outer[name])


def _dispatch(
    experts: torch.nn.Module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    call: ExpertsCall = getattr(experts, _CALL, None) or library_experts
    return call(experts, hidden, ids, weights)


def library_experts(
    experts: torch.nn.Module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the outputs [tokens, hidden] of all candidates, as transformers computes them."""
    # Of the library's implementations the fastest on a CPU in float32; "batched_mm" copies weights
    # per row. Like all of them it knows every layout: transposed, biased, with a gate of its own.
    # In parts, so that what it keeps per pair stays near the caches: 1.4 times as fast.
    tokens = max(1, _PAIRS // ids.shape[1])
    parts = zip(*(torch.split(tensor, tokens) for tensor in (hidden, ids, weights)), strict=True)
    return torch.cat([grouped_mm_experts_forward(experts, *part) for part in parts])
