"""Model and calibration set -> sensitivity profile: what fewer experts cost each layer.

``kl``: the mean over tokens of KL(full model || only layer l at k), in nats. ``ppl-suffix``, the
paper's: perplexity with layer l at k, every later layer at top-1, every earlier one at K.
``output`` and ``fisher`` take one pass for all layers; see the modules that measure them. With a
correction, the layer at k has the one fitted for it alone; the others have none. ``output`` and
``fisher`` also tell what experts of 4 and 8 bits cost; see `sensitivity_bits`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.errors import ProfileError, UnsupportedModelError
from alloc_moe.compiler.records import (
    CorrectionMode,
    Metric,
    MoeLayer,
    MoeModel,
    PartialSums,
    Redistribution,
    SensitivityProfile,
)
from alloc_moe.compiler.saved import save_text
from alloc_moe.compiler.sensitivity_bits import Rounded, make_rounded
from alloc_moe.compiler.sensitivity_correct import Reduced, make_reduced, measured_correction
from alloc_moe.compiler.sensitivity_fisher import FisherRun
from alloc_moe.compiler.sensitivity_keep import measured_redistribution
from alloc_moe.compiler.sensitivity_output import OutputRun
from alloc_moe.compiler.sensitivity_replay import ReplayRun
from alloc_moe.compiler.sensitivity_sums import LayerSums

if TYPE_CHECKING:
    from alloc_moe.compiler.calibration import CalibrationSet
    from alloc_moe.passes.blockwise import BlockFormat
    from alloc_moe.runtime.command import Console

logger = logging.getLogger(__name__)

_TOKENS_PER_BATCH = 1024  # of the metrics that take one pass: bounds the memory of activations
_SECONDS_PER_SAVE = 30.0  # of those metrics: at most this much is measured again after a kill

_COMPARED = {
    "metric": "the metric",
    "model_fingerprint": "the model",
    "layer_names": "the MoE layers",
    "experts_per_token": "the experts per token",
    "calibration_sha256": "the calibration text",
    "tokens": "the number of tokens",
    "sequence_length": "the sequence length",
    "seed": "the seed",
    "redistribution": "the redistribution",
    "correction": "the correction",
    "bits": "the bits of experts",
}


def measure_sensitivity(
    moe_model: MoeModel,
    calibration: CalibrationSet,
    *,
    metric: Metric,
    redistribution: Redistribution = "none",
    correction: CorrectionMode = "none",
    formats: Sequence[Sequence[BlockFormat]] = (),
    path: Path | None = None,
    console: Console | None = None,
) -> SensitivityProfile:
    """Return the cost of each number of experts in each MoE layer.

    The router's weights are taken as they are.

    Args:
        moe_model: The model, in float32.
        calibration: The tokens to measure on.
        metric: What cost means.
        redistribution: Which of a layer's candidates run at a mean of k. Each calibration window is
            a pool of its own, so that ``batch`` means ``sequence``; for ``price``, which takes the
            experts' sizes and no costs, these are as for ``none``.
        correction: How a layer at k is corrected, by least squares on the same tokens. Sizes of
            experts are as without: centring them, as the shift per expert would suggest, gave the
            same plans on the bundled model. None is fitted for ``price`` and ``data-free``.
        formats: Per MoE layer, the formats to measure its experts in, the widths being those of all
            layers; the model's experts must be floats. For ``output`` and ``fisher`` only.
        path: Where the profile is saved after every layer, for ``output`` and ``fisher`` every half
            minute. If there is one already, only what it lacks is measured, with the same result as
            without the interruption.
        console: Where progress is reported.

    Raises:
        ProfileError: The file at `path` is of another model, text or setting, or no profile.
        UnsupportedModelError: The model can't be run in parts, or gives no finite output.
        OutputError: The file can't be written.
    """
    policy = measured_redistribution(redistribution)
    correction = measured_correction(metric, redistribution, correction)
    bits = tuple(form.bits for form in formats[0]) if formats else ()
    assert not bits or metric in ("output", "fisher")
    profile = _empty_profile(moe_model, calibration, metric, policy, correction, bits)
    if path is not None and path.exists():
        profile = _resume(profile, path, moe_model.layers)
    if profile.complete:
        return profile
    if path is not None:
        _save(profile, path)  # finds out now, not after the first layer, whether that is possible
    if metric in ("output", "fisher", "data-free"):
        return _measure_windows(moe_model, calibration, profile, formats, path, console)
    return _measure_layers(moe_model, calibration, profile, path, console)


def _measure_layers(
    moe_model: MoeModel,
    calibration: CalibrationSet,
    profile: SensitivityProfile,
    path: Path | None,
    console: Console | None,
) -> SensitivityProfile:
    """Complete a profile layer by layer."""
    start = time.monotonic()
    todo = [layer for layer, row in enumerate(profile.costs) if row is None]
    reduced = None
    if (profile.redistribution, profile.correction) != ("none", "none"):
        batches = _batches(moe_model, calibration)
        reduced = make_reduced(moe_model, batches, profile.redistribution, profile.correction)
    run = ReplayRun(moe_model, calibration, metric=profile.metric, reduced=reduced)
    total = sum(run.operations(layer) for layer in todo)
    with _progress(console, total) as advance, torch.inference_mode():
        baseline = _finite(run.enter(todo[0]))
        for layer in todo:
            row = run.measure(layer, advance)
            logger.debug("%s costs %s", moe_model.layers[layer].name, row)
            costs = (*profile.costs[:layer], row, *profile.costs[layer + 1 :])
            now = time.monotonic()
            profile = dataclasses.replace(
                profile,
                costs=costs,
                baseline_loss=baseline,
                seconds=profile.seconds + now - start,
            )
            start = now
            if path is not None:
                _save(profile, path)
    return profile


def _measure_windows(
    moe_model: MoeModel,
    calibration: CalibrationSet,
    profile: SensitivityProfile,
    formats: Sequence[Sequence[BlockFormat]],
    path: Path | None,
    console: Console | None,
) -> SensitivityProfile:
    """Complete a profile of all layers at once, some calibration windows after others."""
    # PyTorch's inference mode, should the caller be in it, makes tensors that gradients can't use.
    with torch.inference_mode(mode=False), torch.no_grad():
        start = saved = time.monotonic()
        partial = profile.partial or _no_sums(moe_model.layers, profile.widths)
        sums = [
            LayerSums.of(layer, row, widths=profile.widths)
            for layer, row in zip(moe_model.layers, partial.layers, strict=True)
        ]
        batches = _batches(moe_model, calibration)
        settings = (profile.redistribution, profile.correction)
        reduced: Reduced | Rounded = (
            make_rounded(moe_model, batches, *settings, formats)
            if formats
            else make_reduced(moe_model, batches, *settings)
        )
        add = _one_pass(moe_model, profile, reduced)
        windows = 0
        with _progress(console, len(calibration.ids), unit="windows") as advance:
            for ids in batches:
                windows += len(ids)
                if windows > partial.windows:
                    loss = partial.loss + _finite(add(ids, windows - len(ids), sums))
                    partial = PartialSums(windows, loss, tuple(each.row() for each in sums))
                    now = time.monotonic()
                    seconds = profile.seconds + now - start
                    profile = dataclasses.replace(profile, partial=partial, seconds=seconds)
                    start = now
                    if path is not None and now - saved >= _SECONDS_PER_SAVE:
                        _save(profile, path)
                        saved = now
                advance(len(ids))
    profile = dataclasses.replace(
        profile,
        costs=tuple(_costs(profile, each) for each in sums),
        expert_sizes=tuple(each.sizes() for each in sums),
        baseline_loss=partial.loss / calibration.ids[:, 1:].size,
        partial=None,
    )
    if path is not None:
        _save(profile, path)
    return profile


def _no_sums(layers: Sequence[MoeLayer], widths: int) -> PartialSums:
    rows = (LayerSums.of(layer, widths=widths).row() for layer in layers)
    return PartialSums(0, 0.0, tuple(rows))


def _costs(profile: SensitivityProfile, sums: LayerSums) -> tuple[float, ...]:
    costs = sums.mean_costs()
    return tuple(map(math.sqrt, costs)) if profile.metric == "data-free" else costs


def _one_pass(
    moe_model: MoeModel, profile: SensitivityProfile, reduced: Reduced | Rounded
) -> Callable[[torch.Tensor, int, Sequence[LayerSums]], float]:
    """Return what adds windows, given the index of the first, to sums, and returns their loss."""
    if profile.metric == "fisher":
        return FisherRun(moe_model, reduced, seed=profile.seed).add
    output = OutputRun(moe_model, reduced)
    if profile.metric == "data-free":
        return functools.partial(output.add_random, seed=profile.seed)
    return lambda ids, _, sums: output.add(ids, sums)


def _batches(moe_model: MoeModel, calibration: CalibrationSet) -> Sequence[torch.Tensor]:
    """Return the calibration windows, as many at a time as one pass takes."""
    ids = torch.from_numpy(calibration.ids).to(moe_model.model.device)
    return torch.split(ids, max(1, _TOKENS_PER_BATCH // calibration.sequence_length))


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise UnsupportedModelError(
            f"The model's loss on the calibration text is {loss}: its weights are broken."
        )
    return loss


def _empty_profile(
    moe_model: MoeModel,
    calibration: CalibrationSet,
    metric: Metric,
    policy: Redistribution,
    correction: CorrectionMode,
    bits: tuple[int, ...],
) -> SensitivityProfile:
    layers: tuple[MoeLayer, ...] = moe_model.layers
    return SensitivityProfile(
        metric=metric,
        model_fingerprint=moe_model.fingerprint,
        calibration_sha256=calibration.sha256,
        tokens=calibration.tokens,
        sequence_length=calibration.sequence_length,
        seed=calibration.seed,
        layer_names=tuple(layer.name for layer in layers),
        experts_per_token=tuple(layer.experts_per_token for layer in layers),
        costs=(None,) * len(layers),
        baseline_loss=0.0,
        seconds=0.0,
        redistribution=policy,
        correction=correction,
        expert_sizes=(None,) * len(layers),
        bits=bits,
    )


def _resume(
    expected: SensitivityProfile, path: Path, layers: Sequence[MoeLayer]
) -> SensitivityProfile:
    """Read the profile at `path`, of which any number of layers may be measured."""
    try:
        found = SensitivityProfile.from_json(path.read_text("utf-8"), path=path)
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"The profile {path} can't be read: {error}.") from error
    differences = [
        words + _both(_in_words(found, name), _in_words(expected, name))
        for name, words in _COMPARED.items()
        if getattr(found, name) != getattr(expected, name)
    ]
    if differences:
        raise ProfileError(
            f"The profile {path} was measured differently: {', '.join(differences)} changed. "
            "Delete the file, or give another path."
        )
    lengths = [
        k if row is None else len(row) / found.widths
        for k, row in zip(found.experts_per_token, found.costs, strict=False)
    ]
    sums = [len(row) for row in found.partial.layers] if found.partial else []
    no_sums = _no_sums(layers, found.widths).layers if found.partial else ()
    fits = sums == [len(row) for row in no_sums]
    if lengths != list(expected.experts_per_token) or not fits:
        raise ProfileError(
            f"The profile {path} is damaged: its costs don't fit its layers. Delete the file."
        )
    return found


def _both(found: object, expected: object) -> str:
    """Show two short values."""
    if isinstance(found, tuple):
        return ""
    return f" (there {found!s:.12}, now {expected!s:.12})"


def _in_words(profile: SensitivityProfile, name: str) -> object:
    value = getattr(profile, name)
    return "/".join(map(str, value)) or "none" if name == "bits" else value


def _save(profile: SensitivityProfile, path: Path) -> None:
    save_text(profile.to_json() + "\n", path, what="The profile")


@contextlib.contextmanager
def _progress(
    console: Console | None, total: float, *, unit: str = "GFLOP"
) -> Iterator[Callable[[float], None]]:
    """Yield a function that reports work as done, in whole units."""
    if console is None:
        yield lambda _: None
        return
    done = 0.0
    with console.progress("Profiling", max(1, round(total)), unit=unit) as progress:

        def advance(work: float) -> None:
            nonlocal done
            done += work
            progress.advance(round(done) - progress.done)

        yield advance
