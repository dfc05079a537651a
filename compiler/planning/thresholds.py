"""Target activations -> thresholds: what score a candidate needs so that the mean is the target.

Policies that compare scores hold a budget in the mean only, so their thresholds are measured: the
model runs under the plan on the calibration tokens, and the quantiles of the scores it meets there
give the next thresholds. Dropping experts changes what later layers see, hence the repetition.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.reference.experts import allocated
from alloc_moe.compiler.reference.policies import LayerParameters
from alloc_moe.compiler.reference.scores import scores
from alloc_moe.runtime.artifact.plan import DialPoint

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Correction, Redistribution, Weights
    from alloc_moe.runtime.artifact.token_sizes import TokenSizes

logger = logging.getLogger(__name__)

_PASSES = 8
_TOLERANCE = 0.002  # relative: how far below the target the mean may stay
_TOKENS_PER_BATCH = 4096
_DIAL_POINTS = 12
_BELOW_TOP_P = -1e30  # below every sum of router weights
_ABOVE_ALL = 1e30  # above every score


@dataclass(frozen=True)
class Setting:
    """How a model runs while thresholds are sought: all of a plan but the thresholds.

    ``sizes[l][e]`` are the expert sizes for ``price``, None for the other policies, ``token_sizes``
    what tokens multiply these by, if they do; ``overlap`` is what `scores` says.
    """

    redistribution: Redistribution
    weights: Weights = "keep"
    sizes: tuple[tuple[float, ...], ...] | None = None
    overlap: float = 0.0
    corrections: tuple[Correction | None, ...] | None = None
    token_sizes: tuple[TokenSizes, ...] | None = None

    def parameters(self, layer: int, k: float, threshold: float) -> LayerParameters:
        """Return what a layer is given where it keeps k in the mean by this threshold."""
        sizes = None if self.sizes is None else self.sizes[layer]
        of_tokens = None if self.token_sizes is None else self.token_sizes[layer]
        return LayerParameters(k, threshold, sizes, overlap=self.overlap, token_sizes=of_tokens)


def keep_all(redistribution: Redistribution) -> float:
    """Return a threshold that every candidate reaches."""
    return _BELOW_TOP_P if redistribution == "top-p" else 0.0


@dataclass(frozen=True)
class Thresholds:
    """Thresholds per MoE layer, and the mean experts per calibration token that they keep."""

    values: tuple[float, ...]
    ks: tuple[float, ...]

    @property
    def activations(self) -> float:
        """The mean over tokens of the experts run in all layers."""
        return sum(self.ks)


def layer_thresholds(
    moe: MoeModel,
    ids: torch.Tensor,
    setting: Setting,
    ks: Sequence[float],
    *,
    advance: Callable[[int], None] = lambda n: None,
) -> Thresholds:
    """Return a threshold per layer, such that layer l keeps ``ks[l]`` experts per token.

    The kept sum is the target at most, and as a rule within 0.2 % of it.

    Args:
        moe: The model.
        ids: Calibration windows [windows, sequence].
        setting: The policy and what else runs.
        ks: The target of each layer, from 1 to its K.
        advance: Called with 1 after each pass over the tokens.
    """
    fixed = [
        _fixed(k, layer.experts_per_token, setting.redistribution)
        for k, layer in zip(ks, moe.layers, strict=True)
    ]

    def choose(found: Sequence[_Falling], targets: Sequence[float]) -> list[float]:
        return [
            layer.threshold_for(k) if value is None else value
            for layer, k, value in zip(found, targets, fixed, strict=True)
        ]

    return _search(moe, ids, setting, list(ks), choose, advance)


def _fixed(k: float, most: int, redistribution: Redistribution) -> float | None:
    """The threshold for all experts or one, which holds on every text; None for those between."""
    if k >= most:
        return keep_all(redistribution)
    return _ABOVE_ALL if k <= 1 else None


def common_threshold(
    moe: MoeModel,
    ids: torch.Tensor,
    setting: Setting,
    activations: float,
    *,
    advance: Callable[[int], None] = lambda n: None,
) -> Thresholds:
    """Return one threshold for all layers, such that they keep `activations` experts in sum.

    Arguments are those of `layer_thresholds`.
    """

    def choose(found: Sequence[_Falling], targets: Sequence[float]) -> list[float]:
        return [_common(found, targets[0])] * len(found)

    return _search(moe, ids, setting, [activations], choose, advance)


def measure_dial(
    moe: MoeModel, ids: torch.Tensor, setting: Setting, *, advance: Callable[[int], None]
) -> tuple[DialPoint, ...]:
    """Return prices from the full model's activations down to one expert per layer.

    Each point's activations are those measured at its price, in one pass over `ids`. ``advance`` is
    called with 1 after each of the `dial_passes()` passes.
    """
    layers, most = len(moe.layers), sum(layer.experts_per_token for layer in moe.layers)
    points = [DialPoint(float(most), 0.0)]
    found = _observe(moe, ids, setting, [0.0] * layers)
    advance(1)
    for step in range(1, _DIAL_POINTS + 1):
        target = most - (most - layers) * step / _DIAL_POINTS
        price = _common(found, target) if step < _DIAL_POINTS else _above(found)
        found = _observe(moe, ids, setting, [price] * layers)
        advance(1)
        activations = sum(layer.kept(price) for layer in found)
        if activations < points[-1].activations and price > points[-1].price:
            points.append(DialPoint(activations, price))
    return tuple(points)


def dropped_costs(moe: MoeModel, ids: torch.Tensor, setting: Setting) -> list[float]:
    """Return what one threshold for all layers costs, for each number of activations it may keep.

    That is half the sum of the squared scores of what isn't kept, per token: with sizes in nats
    about what the loss rises by, if nothing makes up for it. First comes one expert per layer, last
    all of them.

    Arguments are those of `common_threshold`. Takes one pass over the tokens.
    """
    found = _observe(moe, ids, setting, [0.0] * len(moe.layers))
    tokens = found[0].tokens
    rising = np.sort(np.concatenate([layer.values for layer in found])).astype(np.float64)
    dropped = np.append(0.0, np.cumsum(rising**2)) / (2 * tokens)
    return [float(cost) for cost in dropped[::-tokens]]


def dial_passes() -> int:
    """The number of passes over the calibration tokens that `measure_dial` takes."""
    return _DIAL_POINTS + 1


def _search(
    moe: MoeModel,
    ids: torch.Tensor,
    setting: Setting,
    wanted: list[float],
    choose: Callable[[Sequence[_Falling], Sequence[float]], list[float]],
    advance: Callable[[int], None],
) -> Thresholds:
    """Alternate between measuring scores and setting thresholds until the sum fits."""
    limit = sum(wanted)
    targets = list(wanted)
    best: Thresholds | None = None
    found = _observe(moe, ids, setting, [keep_all(setting.redistribution)] * len(moe.layers))
    advance(1)
    for attempt in range(_PASSES):
        values = choose(found, targets)
        found = _observe(moe, ids, setting, values)
        advance(1)
        tried = _kept(found, values)
        logger.debug("Pass %d keeps %.4f of %.4f", attempt, tried.activations, limit)
        if tried.activations <= limit and (best is None or tried.activations > best.activations):
            best = tried
        if limit * (1 - _TOLERANCE) <= tried.activations <= limit:
            break
        # Aims a little below, as a sum above the limit is refused.
        excess = tried.activations - limit * (1 - _TOLERANCE / 2)
        targets = [max(target - excess * target / sum(targets), 1.0) for target in targets]
    # Scores in clumps, as of a router that gives equal weights; one expert per layer always fits.
    for higher in ([_next_above(value) for value in values], [_ABOVE_ALL] * len(values)):
        if best is None:
            tried = _kept(_observe(moe, ids, setting, higher), higher)
            best = tried if tried.activations <= limit else None
    assert best is not None
    return best


def _kept(found: Sequence[_Falling], thresholds: Sequence[float]) -> Thresholds:
    ks = (layer.kept(value) for layer, value in zip(found, thresholds, strict=True))
    return Thresholds(tuple(thresholds), tuple(ks))


class _Falling:
    """The scores of one layer's second and later candidates, in falling order."""

    def __init__(self, values: torch.Tensor, tokens: int) -> None:
        self.values = np.sort(values.numpy())[::-1]
        self.tokens = tokens

    def kept(self, threshold: float) -> float:
        """The mean number of experts per token that run, the first included."""
        above = np.searchsorted(-self.values, -np.float32(threshold), side="right")
        return 1 + float(above) / self.tokens

    def threshold_for(self, k: float) -> float:
        """The threshold that keeps k per token, or as near below as equal scores allow."""
        return _cut(self.values, math.floor((k - 1) * self.tokens))


def _common(found: Sequence[_Falling], activations: float) -> float:
    values = np.sort(np.concatenate([layer.values for layer in found]))[::-1]
    return _cut(values, math.floor((activations - len(found)) * found[0].tokens))


def _cut(falling: np.ndarray, count: int) -> float:
    """Return a float32 that `count` of the values reach, or as few less as equal ones allow."""
    if len(falling) == 0:  # of layers with one candidate, which runs in any case
        return _ABOVE_ALL
    if count >= len(falling):
        return float(falling[-1])
    if count <= 0:
        return _next_above(float(falling[0]))
    inside, outside = falling[count - 1], falling[count]
    return float(inside) if inside > outside else _next_above(float(inside))


def _above(found: Sequence[_Falling]) -> float:
    return _next_above(max(float(layer.values[0]) for layer in found if len(layer.values)))


def _next_above(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


@torch.inference_mode()
def _observe(
    moe: MoeModel, ids: torch.Tensor, setting: Setting, thresholds: Sequence[float]
) -> list[_Falling]:
    """Run the model under `thresholds` and return the scores it met in each layer."""
    inputs = ("scores", moe.fingerprint, ids, setting, list(thresholds))
    found = moe.results.recall(inputs, lambda: _scores(moe, ids, setting, thresholds))
    return [_Falling(layer, ids.numel()) for layer in found]


def _scores(
    moe: MoeModel, ids: torch.Tensor, setting: Setting, thresholds: Sequence[float]
) -> list[torch.Tensor]:
    parts: list[list[torch.Tensor]] = [[] for _ in moe.layers]

    def watch(
        layer: int, weights: torch.Tensor, candidates: torch.Tensor, given: LayerParameters
    ) -> None:
        found = scores(setting.redistribution, weights, candidates, given.sizes, setting.overlap)
        parts[layer].append(found[:, 1:].flatten().cpu())

    parameters = [
        # A cap is for single calls: means are set without it.
        setting.parameters(index, layer.experts_per_token, threshold)
        for index, (layer, threshold) in enumerate(zip(moe.layers, thresholds, strict=True))
    ]
    stack = DecoderStack(moe.model, moe.layers[0])
    with allocated(
        moe.model,
        moe.layers,
        parameters,
        redistribution=setting.redistribution,
        weights=setting.weights,
        corrections=setting.corrections,
        watch=watch,
    ):
        batches = torch.split(ids, max(1, _TOKENS_PER_BATCH // ids.shape[1]))
        for _ in stack.stream((batch, None) for batch in batches):
            pass  # what is wanted was watched
    return [torch.cat(layer) for layer in parts]
