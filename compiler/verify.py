"""The parity gate: the artifact in onnxruntime against PyTorch with the same plan."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from alloc_moe.compiler.cache_scales import RoundedCache
from alloc_moe.compiler.cached_replay import CachedRun, run_by_layers
from alloc_moe.compiler.errors import VerificationError
from alloc_moe.compiler.policies import SCORED, layer_parameters
from alloc_moe.compiler.quantization import exact_copy, float_weights
from alloc_moe.compiler.reference import allocated
from alloc_moe.runtime.providers import cuda_obstacle
from alloc_moe.runtime.session import ArtifactSession, open_session

if TYPE_CHECKING:
    from alloc_moe.compiler.records import Correction, MoeModel, Redistribution, Weights
    from alloc_moe.compiler.reference import Activations
    from alloc_moe.passes.quantize_cache import CacheScales
    from alloc_moe.runtime.artifact import AllocationPlan

logger = logging.getLogger(__name__)

MAX_LOGIT_ERROR = 1e-3
"""The greatest difference of any logit that a float32 artifact may show."""

MAX_ROUNDED_LOGIT_ERROR = 0.05
"""The same with an int8 cache: of two equal numbers, one may be rounded up and the other down."""

MAX_KL = {"float16": 0.1, "bfloat16": 0.1, "int8": 0.1, "int4": 1.0}
"""The greatest mean divergence, in nats per token, that rounding to a type may explain."""

MAX_COUNT_ERROR = 0.02
"""The greatest share of decisions by score that rounding to 16 bits may turn in a layer."""

_PROMPT_LENGTHS = (23, 14, 5)
_DECODE_STEPS = 4
# Router weights closer than this may be ranked differently by two correct float32 computations.
_NEAR_TIE = 5e-6
_ATTEMPTS = 8


@dataclass(frozen=True)
class Verification:
    """How far artifact and reference are apart.

    ``kl`` is the mean over tokens of KL(reference || artifact) in nats, ``tokens`` their number. Of
    a quantised artifact ``max_abs_logit_error`` is that against PyTorch with the same rounded
    weights, activations unrounded in both; ``kl`` is that of the artifact as it is against PyTorch
    in float32 under the same plan.
    """

    max_abs_logit_error: float
    kl: float
    tokens: int

    def to_plan(self) -> dict[str, Any]:
        """Return the plan's ``verify`` entry."""
        return dataclasses.asdict(self)


def verify_artifact(
    path: Path,
    moe: MoeModel,
    plan: AllocationPlan,
    token_ids: NDArray[np.int64],
    *,
    dtype: str,
    corrections: Sequence[Correction | None] | None = None,
    cache_scales: CacheScales = MappingProxyType({}),
) -> Verification:
    """Run the artifact at `path` and compare every logit of real tokens with PyTorch's.

    A left-padded batch of three prompts is prefilled, then decoded token by token with the cache; a
    plan with a dial is run at another of its prices too. Text in which some decision of the router
    hangs on a near-tie is passed over: there, two correct computations may choose differently.

    Args:
        path: An .onnx file whose metadata hold a plan.
        moe: The model it was made of.
        plan: The plan it was compiled for.
        token_ids: Text to take the prompts from [windows, tokens].
        dtype: The artifact's; float32 must agree within `MAX_LOGIT_ERROR` (with an int8 cache
            `MAX_ROUNDED_LOGIT_ERROR`), others in the mean within `MAX_KL`. Quantised ones must do
            both: the first with rounded weights and without the kernels' rounding of activations,
            the second as they are.
        corrections: What its experts were changed by, per MoE layer.
        cache_scales: Of an int8 cache. PyTorch's is rounded alike.

    Raises:
        VerificationError: The logits differ by more, or the artifact executes other activations.
    """
    given = (moe, plan, token_ids, corrections, cache_scales)
    if moe.quantization is None:
        runs = _run_both(_open(path, dtype), *given)
        result = _compare_runs(runs)
    else:
        with exact_copy(path) as exact:
            runs = _run_both(_open(exact, dtype), *given)
        result = _compare_runs(runs)
        session = _open(path, dtype)
        with float_weights(moe):
            rounded = _compare_runs(_run_both(session, moe, plan, token_ids, corrections, {}))
        result = dataclasses.replace(result, kl=rounded.kl)
    activations = moe.quantization.activations if moe.quantization else dtype
    exactly = activations == "float32" and not cache_scales
    limit = MAX_ROUNDED_LOGIT_ERROR if cache_scales else MAX_LOGIT_ERROR
    _check_logits(result, dtype, limit if activations == "float32" else math.inf)
    for reference, _, counted in runs:
        _check_counts(reference, counted, plan, exact=exactly)
    return result


_Runs = list[tuple["_Reference", NDArray[np.float32], list[int]]]


def _open(path: Path, dtype: str) -> ArtifactSession:
    return open_session(path, ep=_provider(dtype), count_activations=True, stop_spinning=True)


def _run_both(
    session: ArtifactSession,
    moe: MoeModel,
    plan: AllocationPlan,
    token_ids: NDArray[np.int64],
    corrections: Sequence[Correction | None] | None,
    cache_scales: CacheScales,
) -> _Runs:
    """Run the reference and the artifact at every price to check."""
    prices = _prices(plan)
    references = _clear_references(moe, plan, token_ids, prices, corrections, cache_scales)
    return [
        (reference, *_artifact(session, reference.batch, price))
        for price, reference in zip(prices, references, strict=True)
    ]


def _compare_runs(runs: _Runs) -> Verification:
    expected = np.concatenate([reference.logits for reference, *_ in runs])
    return _compare(expected, np.concatenate([actual for _, actual, _ in runs]))


def _prices(plan: AllocationPlan) -> list[float | None]:
    """The plan's own price (None), and that of the dial's point farthest from it if it has one."""
    if plan.redistribution != "price" or plan.cap is not None or not plan.dial:
        return [None]
    planned = plan.budget.activations
    farthest = max(plan.dial, key=lambda point: abs(point.activations - planned))
    return [None, farthest.price]


def _check_logits(result: Verification, dtype: str, limit: float) -> None:
    if math.isfinite(limit) and not result.max_abs_logit_error <= limit:
        raise VerificationError(
            "The artifact's logits differ from PyTorch's by up to "
            f"{result.max_abs_logit_error:.2e} (allowed: {limit:g}), so it was not "
            "written. This is a fault of the compiler or of onnxruntime for this architecture; "
            "please report it with the model's config.json."
        )
    if not np.isfinite(result.kl):
        raise VerificationError(
            f"The artifact gives logits that are no numbers in {dtype}, so it was not written. "
            "Use --dtype float32."
        )
    if dtype != "float32" and result.kl > MAX_KL[dtype]:
        raise VerificationError(
            f"The artifact's predictions diverge from PyTorch's by {result.kl:.2g} nats per token, "
            f"more than {dtype} explains (allowed: {MAX_KL[dtype]:g}), so it was not written. "
            "Use --dtype float32."
        )


def _check_counts(
    reference: _Reference, counted: list[int], plan: AllocationPlan, *, exact: bool
) -> None:
    """Compare the experts that the artifact executed in each layer with those of the reference.

    Rounding to 16 bits moves some scores over their threshold, but few.
    """
    # In the masked lowering each padding token runs one expert per layer; the reference runs none.
    pads = int((reference.batch.mask == 0).sum())
    tokens = len(reference.logits)
    scored = plan.redistribution in SCORED and not exact
    for extra in (0, pads):
        found = zip(counted, reference.executed, plan.layers, strict=True)
        if all(
            abs(count - extra - executed) <= scored * MAX_COUNT_ERROR * tokens * layer.k_original
            for count, executed, layer in found
        ):
            return
    raise VerificationError(
        f"The artifact executed {counted} experts per layer where the plan says "
        f"{reference.executed}, so it was not written. Please report it with the model's "
        "config.json."
    )


def check_verifiable(dtype: str) -> None:
    """Raise VerificationError if this machine can't run an artifact of `dtype`."""
    obstacle = cuda_obstacle() if _provider(dtype) == "cuda" else None
    if obstacle is not None:
        raise VerificationError(
            f"A {dtype} artifact runs on CUDA only and is verified there, but {obstacle}. "
            "Use --dtype float16, or compile on a machine with CUDA."
        )


def _provider(dtype: str) -> Literal["cpu", "cuda"]:
    # onnxruntime's CPU provider computes float16 by way of float32; it has no bfloat16 at all.
    return "cuda" if dtype == "bfloat16" else "cpu"


@dataclass(frozen=True)
class _Batch:
    """Left-padded prompts [3, longest], their mask, and the tokens to decode [3, steps]."""

    prompts: NDArray[np.int64]
    mask: NDArray[np.int64]
    decoded: NDArray[np.int64]

    @classmethod
    def of(cls, tokens: NDArray[np.int64]) -> _Batch:
        longest = max(_PROMPT_LENGTHS)
        prompts = np.zeros((len(_PROMPT_LENGTHS), longest), np.int64)
        mask = np.zeros_like(prompts)
        start = 0
        for row, length in enumerate(_PROMPT_LENGTHS):
            prompts[row, longest - length :] = tokens[start : start + length]
            mask[row, longest - length :] = 1
            start += length
        return cls(prompts, mask, tokens[start:].reshape(len(_PROMPT_LENGTHS), _DECODE_STEPS))

    def steps(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Return (input_ids, attention_mask) of each call."""
        ones = np.ones_like(self.decoded)
        calls = [(self.prompts, self.mask)]
        for step in range(self.decoded.shape[1]):
            mask = np.concatenate([self.mask, ones[:, : step + 1]], axis=1)
            calls.append((self.decoded[:, step : step + 1], mask))
        return calls

    def inputs(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return (input_ids, attention_mask, position_ids) of each call."""
        calls = []
        for ids, mask in self.steps():
            positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
            arrays = (ids.copy(), mask, positions.copy())
            calls.append(tuple(map(torch.from_numpy, arrays)))
        return calls  # type: ignore[return-value]

    def real(self, logits: Sequence[NDArray[np.floating]]) -> NDArray[np.float32]:
        """Return the logits of real tokens of all calls [tokens, vocabulary]."""
        first, *rest = logits
        return np.concatenate(
            [first[self.mask > 0], *(step[:, 0] for step in rest)], dtype=np.float32
        )


@dataclass(frozen=True)
class _Reference:
    """What PyTorch gives for a batch: logits of real tokens, experts run by layer, least margin."""

    batch: _Batch
    logits: NDArray[np.float32]
    executed: list[int]
    margin: float


def _clear_references(
    moe: MoeModel,
    plan: AllocationPlan,
    token_ids: NDArray[np.int64],
    prices: Sequence[float | None],
    corrections: Sequence[Correction | None] | None,
    cache_scales: CacheScales = MappingProxyType({}),
) -> list[_Reference]:
    """Run PyTorch, at each price, on a part of the text without near-ties or the clearest part."""
    text = token_ids.reshape(-1)
    needed = sum(_PROMPT_LENGTHS) + 3 * _DECODE_STEPS
    text = np.resize(text, max(needed, text.size))
    starts = [attempt * needed % (text.size - needed + 1) for attempt in range(_ATTEMPTS)]
    batches = [_Batch.of(text[start : start + needed]) for start in starts]
    plans = [
        functools.partial(
            allocated,
            moe.model,
            moe.layers,
            layer_parameters(plan, price),
            redistribution=cast("Redistribution", plan.redistribution),
            weights=cast("Weights", plan.weights),
            corrections=corrections,
        )
        for price in prices
    ]
    if moe.offloading is None:
        return [
            _clearest(_reference(moe, batch, run, cache_scales) for batch in batches)
            for run in plans
        ]
    # All at once: reading the layers takes longer than running them.
    runs = [[CachedRun(batch.inputs(), run, cache_scales) for batch in batches] for run in plans]
    run_by_layers(moe, [run for row in runs for run in row])
    return [
        _clearest(
            _Reference(
                batch,
                batch.real([logits.numpy() for logits in run.logits]),
                run.executed,
                run.margin,
            )
            for batch, run in zip(batches, row, strict=True)
        )
        for row in runs
    ]


def _clearest(references: Iterable[_Reference]) -> _Reference:
    """Return the first without near-ties, else the clearest; those after it aren't asked for."""
    best: _Reference | None = None
    for attempt, reference in enumerate(references):
        if best is None or reference.margin > best.margin:
            best = reference
        if best.margin >= _NEAR_TIE:
            break
        logger.debug("Verification text %d has a near-tie of %.1e.", attempt, reference.margin)
    assert best is not None
    return best


def _reference(
    moe: MoeModel,
    batch: _Batch,
    plan: Callable[[], AbstractContextManager[Activations]],
    cache_scales: CacheScales,
) -> _Reference:
    logits = []
    cache = RoundedCache(cache_scales) if cache_scales else None
    with torch.inference_mode(), plan() as activations:
        for ids, mask, positions in batch.inputs():
            output = moe.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            logits.append(output.logits.float().numpy())
    return _Reference(batch, batch.real(logits), activations.executed, activations.margin)


def _artifact(
    session: ArtifactSession, batch: _Batch, price: float | None
) -> tuple[NDArray[np.float32], list[int]]:
    logits = []
    counts = []
    cache = session.empty_cache(len(batch.prompts))
    for ids, mask in batch.steps():
        output = session.run(ids, attention_mask=mask, cache=cache, price=price)
        logits.append(output.logits)
        counts.append(output.activations)
    return batch.real(logits), np.asarray(counts, np.int64).sum(0).tolist()


def _compare(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> Verification:
    p = torch.from_numpy(expected).double().log_softmax(-1)
    q = torch.from_numpy(actual).double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return Verification(float(np.abs(expected - actual).max()), float(kl), len(expected))
