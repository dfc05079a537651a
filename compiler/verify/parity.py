"""The parity gate: the artifact in onnxruntime against PyTorch with the same plan."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from alloc_moe.compiler.errors import VerificationError
from alloc_moe.compiler.records import SCORED, Verification
from alloc_moe.compiler.rounding.weights import float_weights
from alloc_moe.compiler.verify.artifact_run import (
    ArtifactRun,
    run_by_segments,
    run_session,
    run_whole,
)
from alloc_moe.compiler.verify.exact import exact_copy
from alloc_moe.compiler.verify.expected import (
    NEAR_TIE,
    Reference,
    clear_references,
    run_again,
    with_same_ties,
)
from alloc_moe.runtime.execution.providers import cuda_obstacle
from alloc_moe.runtime.execution.torch_programs.session import open_program

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Correction
    from alloc_moe.passes.attention.quantize_cache import CacheScales
    from alloc_moe.runtime.artifact.files import ArtifactFiles
    from alloc_moe.runtime.artifact.plan import AllocationPlan

MAX_LOGIT_ERROR = 1e-3
"""The greatest difference of any logit that a float32 artifact may show."""

MAX_ROUNDED_LOGIT_ERROR = 0.05
"""The same with an int8 cache: of two equal numbers, one may be rounded up and the other down."""

MAX_KL = {"float16": 0.1, "bfloat16": 0.1, "int8": 0.1, "int4": 1.0}
"""The greatest mean divergence, in nats per token, that rounding to a type may explain."""

SEGMENT_BYTES = 1 << 30
"""The most weights that are loaded at a time of an offloaded model's artifact, unless one operator
has more."""

MAX_COUNT_ERROR = 0.02
"""The greatest share of decisions by score that rounding to 16 bits may turn in a layer."""


def verify_artifact(
    artifact: Path | ArtifactFiles,
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
    plan with a dial is run at another of its prices too. Text in which some choice of the plan
    hangs on a near-tie is passed over: there, two correct computations may choose differently.
    Where all texts have one, or a router has, PyTorch takes it as the artifact does. If the model's
    layers are read when they run, the artifact is run segment by segment as well.

    Args:
        artifact: An .onnx file whose metadata hold a plan, or one of torch with its metadata.
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
    run_both = functools.partial(
        _run_both, dtype=dtype, moe=moe, plan=plan, token_ids=token_ids, corrections=corrections
    )
    activations = moe.quantization.activations if moe.quantization else dtype
    exactly = activations == "float32" and not cache_scales
    limit = MAX_ROUNDED_LOGIT_ERROR if cache_scales else MAX_LOGIT_ERROR
    limit = limit if activations == "float32" else math.inf
    settle = functools.partial(
        _settle_ties, moe=moe, plan=plan, corrections=corrections, cache_scales=cache_scales
    )
    if moe.quantization is None:
        runs = settle(artifact, run_both(artifact, cache_scales=cache_scales), limit, exact=exactly)
        result = _compare_runs(runs)
    else:
        assert isinstance(artifact, Path)  # programs of torch are of floats
        with exact_copy(artifact) as exact:
            runs = settle(exact, run_both(exact, cache_scales=cache_scales), limit, exact=exactly)
        result = _compare_runs(runs)
        with float_weights(moe):
            rounded = _compare_runs(run_both(artifact, cache_scales={}))
        result = dataclasses.replace(result, kl=rounded.kl)
    _check_logits(runs, result, dtype, limit)
    for reference, _, counted in runs:
        _check_counts(reference, counted, plan, exact=exactly)
    return result


def verify_checkpoint(
    written: MoeModel,
    moe: MoeModel,
    plan: AllocationPlan,
    token_ids: NDArray[np.int64],
    *,
    dtype: str,
    corrections: Sequence[Correction | None],
    left: Sequence[Correction | None],
) -> Verification:
    """Run a checkpoint that was written in PyTorch, and compare every logit as `verify_artifact`.

    Args:
        written: The checkpoint, loaded as any other.
        moe: The model it was made of.
        plan: What both run under.
        token_ids: Text to take the prompts from [windows, tokens].
        dtype: Of the weights that were written.
        corrections: What the model's experts were changed by, per MoE layer.
        left: What of that is not in the weights.

    Raises:
        VerificationError: The logits differ by more than `verify_artifact` allows, or other
            activations are executed.
    """
    prices = _prices(plan)
    references = clear_references(moe, plan, token_ids, prices, corrections)
    found = run_again(written, plan, references, prices, left)
    runs = [
        (own, other.logits, other.executed) for own, other in zip(references, found, strict=True)
    ]
    result = _compare_runs(runs)
    exactly = dtype == "float32"
    _check_logits(runs, result, dtype, MAX_LOGIT_ERROR if exactly else math.inf)
    for reference, _, counted in runs:
        _check_counts(reference, counted, plan, exact=exactly)
    return result


_Run = tuple[Reference, NDArray[np.float32], list[int]]
_Runs = list[_Run]


def _run_both(
    artifact: Path | ArtifactFiles,
    *,
    dtype: str,
    moe: MoeModel,
    plan: AllocationPlan,
    token_ids: NDArray[np.int64],
    corrections: Sequence[Correction | None] | None,
    cache_scales: CacheScales,
) -> _Runs:
    """Run the reference and the artifact at every price to check."""
    prices = _prices(plan)
    references = clear_references(moe, plan, token_ids, prices, corrections, cache_scales)
    runs = [
        ArtifactRun(reference.batch.steps(), price)
        for price, reference in zip(prices, references, strict=True)
    ]
    if not isinstance(artifact, Path):
        run_session(open_program(artifact, counting=True), runs)
    elif moe.offloading is not None and _provider(dtype) == "cpu":
        run_by_segments(artifact, runs, limit=SEGMENT_BYTES)
    else:
        run_whole(artifact, runs, ep=_provider(dtype))
    return [
        (reference, reference.batch.real(run.logits), run.executed)
        for reference, run in zip(references, runs, strict=True)
    ]


def _settle_ties(
    artifact: Path | ArtifactFiles,
    runs: _Runs,
    limit: float,
    *,
    exact: bool,
    moe: MoeModel,
    plan: AllocationPlan,
    corrections: Sequence[Correction | None] | None,
    cache_scales: CacheScales,
) -> _Runs:
    """Let PyTorch take near-ties as the artifact does, where the two differ and that may be why.

    Programs of torch don't say which experts run, graphs for CUDA say it in another order of rows;
    these are left as they are.
    """
    if not isinstance(artifact, Path) or not math.isfinite(limit):
        return runs
    settled = []
    for price, run in zip(_prices(plan), runs, strict=True):
        reference, logits, counted = run
        if reference.closest < NEAR_TIE and not (
            _logits_agree(run, limit) and _counts_agree(reference, counted, plan, exact=exact)
        ):
            again = ArtifactRun(reference.batch.steps(), price)
            run_by_segments(artifact, [again], limit=SEGMENT_BYTES)
            if _by_token(again):
                reference = with_same_ties(
                    reference,
                    again.chosen,
                    moe=moe,
                    plan=plan,
                    price=price,
                    corrections=corrections,
                    cache_scales=cache_scales,
                )
        settled.append((reference, logits, counted))
    return settled


def _logits_agree(run: _Run, limit: float) -> bool:
    reference, logits, _ = run
    return _largest_error(reference.logits, logits) <= limit


def _by_token(run: ArtifactRun) -> bool:
    """Return whether an artifact said for each token which experts run."""
    return all(
        len(chosen) == ids.size
        for layer in run.chosen
        for chosen, (ids, _) in zip(layer, run.calls, strict=True)
    )


def _compare_runs(runs: _Runs) -> Verification:
    expected = np.concatenate([reference.logits for reference, *_ in runs])
    return _compare(expected, np.concatenate([actual for _, actual, _ in runs]))


def _prices(plan: AllocationPlan) -> list[float | None]:
    """The plan's own price (None), and that of the dial's point farthest from it if it has one."""
    if not plan.takes_price or not plan.dial:
        return [None]
    planned = plan.budget.activations
    farthest = max(plan.dial, key=lambda point: abs(point.activations - planned))
    return [None, farthest.price]


def _check_logits(runs: _Runs, result: Verification, dtype: str, limit: float) -> None:
    if math.isfinite(limit) and not result.max_abs_logit_error <= limit:
        why = (
            "This is a fault of the compiler or of onnxruntime for this architecture; "
            "please report it with the model's config.json."
        )
        margin = max(run[0].closest for run in runs if not _logits_agree(run, limit))
        if margin < NEAR_TIE and np.isfinite(result.max_abs_logit_error):
            why = (
                "In every text that was tried some choice of experts is a tie but for "
                f"{margin:.1e} of a router's weight, which may be all of it: give another "
                "--calibration text or --seed."
            )
        raise VerificationError(
            "The artifact's logits differ from PyTorch's by up to "
            f"{result.max_abs_logit_error:.2e} (allowed: {limit:g}), so it was not written. {why}"
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
    reference: Reference, counted: list[int], plan: AllocationPlan, *, exact: bool
) -> None:
    """Compare the experts that the artifact executed in each layer with those of the reference."""
    if not _counts_agree(reference, counted, plan, exact=exact):
        raise VerificationError(
            f"The artifact executed {counted} experts per layer where the plan says "
            f"{reference.executed}, so it was not written. Please report it with the model's "
            "config.json."
        )


def _counts_agree(
    reference: Reference, counted: list[int], plan: AllocationPlan, *, exact: bool
) -> bool:
    """Return whether the artifact executed as many experts as the reference in each layer.

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
            return True
    return False


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


def _compare(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> Verification:
    p = torch.from_numpy(expected).double().log_softmax(-1)
    q = torch.from_numpy(actual).double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return Verification(_largest_error(expected, actual), float(kl), len(expected))


def _largest_error(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    return float(np.abs(expected - actual).max())
