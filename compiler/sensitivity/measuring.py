"""Model and calibration set -> sensitivity profile: what fewer experts cost each layer.

``kl``: the mean over tokens of KL(full model || only layer l at k), in nats. ``ppl-suffix``, the
paper's: perplexity with layer l at k, every later layer at top-1, every earlier one at K.
``output`` and ``fisher`` take one pass for all layers; see the modules that measure them. With a
correction, the layer at k has the one fitted for it alone; the others have none. ``output`` and
``fisher`` also tell what experts of 4 and 8 bits cost; see `sensitivity.bits`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.model.layer_progress import forward_gflop
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.records import (
    SIZED,
    CorrectionMode,
    Metric,
    PartialSums,
    Redistribution,
    SensitivityProfile,
)
from alloc_moe.compiler.sensitivity.bits import Rounded
from alloc_moe.compiler.sensitivity.corrected import Reduced, measured_correction
from alloc_moe.compiler.sensitivity.fisher import FisherRun
from alloc_moe.compiler.sensitivity.job import Job, progress_in_units
from alloc_moe.compiler.sensitivity.kept import measured_redistribution
from alloc_moe.compiler.sensitivity.layerwise import Rows, StreamedRun
from alloc_moe.compiler.sensitivity.output import OutputRun
from alloc_moe.compiler.sensitivity.profiles import (
    COMPARED,
    empty_profile,
    no_sums,
    read_profile,
)
from alloc_moe.compiler.sensitivity.replayed import ReplayRun
from alloc_moe.compiler.sensitivity.sums import LayerSums, reduced_rows
from alloc_moe.compiler.workspace.processes import Processes
from alloc_moe.compiler.workspace.states import LayerStates

if TYPE_CHECKING:
    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.passes.blockwise import BlockFormat
    from alloc_moe.runtime.console import Console

logger = logging.getLogger(__name__)

_ALONE = Processes()
_SECONDS_PER_SAVE = 30.0  # of one-pass metrics: at most this much is measured again after a kill


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
    processes: Processes = _ALONE,
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
        processes: Those that share the work; all of them call this, and get the same profile.

    Raises:
        ProfileError: The file at `path` is of another model, text or setting, or no profile.
        UnsupportedModelError: The model can't be run in parts, or gives no finite output.
        OutputError: The file can't be written.
        ProcessError: Another process ended early.
    """
    policy = measured_redistribution(redistribution)
    correction = measured_correction(metric, redistribution, correction)
    bits = tuple(form.bits for form in formats[0]) if formats else ()
    assert not bits or metric in SIZED
    profile = empty_profile(moe_model, calibration, metric, policy, correction, bits)
    if processes.writes and path is not None and path.exists():
        profile = read_profile(profile, path, moe_model.layers)
    profile = processes.broadcast(profile)
    if profile.complete:
        return profile
    job = Job(moe_model, calibration, formats, path, console, processes)
    job.save(profile)  # finds out now, not after the first layer, whether that is possible
    if metric not in ("output", "fisher", "data-free"):
        return _measure_layers(job, profile)
    if moe_model.offloading is not None:
        return _measure_streamed(job, profile)
    return _measure_windows(job, profile)


def _measure_layers(job: Job, profile: SensitivityProfile) -> SensitivityProfile:
    """Complete a profile one layer's costs after another's."""
    moe_model = job.moe_model
    start = time.monotonic()
    todo = [layer for layer, row in enumerate(profile.costs) if row is None]
    reduced: Reduced | None = None
    if (profile.redistribution, profile.correction) != ("none", "none"):
        found = job.reduced(profile)
        assert isinstance(found, Reduced)  # these metrics measure no widths
        reduced = found
    run = ReplayRun(
        moe_model,
        job.calibration,
        metric=profile.metric,
        reduced=reduced,
        processes=job.processes,
    )
    total = sum(run.operations(layer) for layer in todo)
    # The full model and the check of the first replay; then what comes after each layer.
    after = [1 - moe_model.layers[layer].decoder_layer / run.decoder_layers for layer in todo]
    job.tell_time(profile, passes=2 + sum(after), gflop=total)
    with progress_in_units(job.console, total) as advance, torch.inference_mode():
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
            job.save(profile)
    return profile


def _measure_windows(job: Job, profile: SensitivityProfile) -> SensitivityProfile:
    """Complete a profile of all layers at once, some calibration windows after others."""
    moe_model, processes = job.moe_model, job.processes
    # PyTorch's inference mode, should the caller be in it, makes tensors that gradients can't use.
    with torch.inference_mode(mode=False), torch.no_grad():
        start = saved = time.monotonic()
        partial = profile.partial or no_sums(moe_model.layers, profile.widths)
        # Those done before a kill are left out, whatever the number of processes was then.
        batches = [(first, ids) for first, ids in job.batches() if first >= partial.windows]
        add = _one_pass(moe_model, profile, job.reduced(profile))
        windows = partial.windows
        with progress_in_units(job.console, len(job.calibration.ids), unit="windows") as advance:
            advance(windows)
            for turn in range(0, len(batches), processes.size):
                together = batches[turn : turn + processes.size]
                sums, loss = job.zeros(profile), 0.0
                if processes.rank < len(together):
                    first, ids = together[processes.rank]
                    loss = add(ids, first, sums)
                rows = reduced_rows(partial.layers, sums, processes)
                loss = processes.add(torch.tensor([loss], dtype=torch.float64)).item()
                done = sum(len(ids) for _, ids in together)
                windows += done
                partial = PartialSums(windows, partial.loss + _finite(loss), rows)
                now = time.monotonic()
                seconds = profile.seconds + now - start
                profile = dataclasses.replace(profile, partial=partial, seconds=seconds)
                start = now
                if now - saved >= _SECONDS_PER_SAVE:
                    job.save(profile)
                    saved = now
                advance(done)
    return _completed(job, profile, partial.layers, partial.loss)


def _measure_streamed(job: Job, profile: SensitivityProfile) -> SensitivityProfile:
    """Complete a profile of all layers, all calibration windows passing layer by layer."""
    start = time.monotonic()
    folder = job.path and job.path.with_name(f".{job.path.name}.states")
    identity = {name: getattr(profile, name) for name in COMPARED}
    states = LayerStates(folder, identity, job.processes)
    with states.held():
        rows, loss = _pass_layers(job, profile, states)
        seconds = profile.seconds + time.monotonic() - start
        profile = dataclasses.replace(profile, seconds=seconds)
        profile = _completed(job, profile, rows, _finite(loss))
        job.processes.add(torch.zeros(1, dtype=torch.float64))  # until the profile is saved
        states.delete()
    return profile


def _pass_layers(job: Job, profile: SensitivityProfile, states: LayerStates) -> tuple[Rows, float]:
    """Return the sums of every layer, and the next-token loss, summed."""
    batches = job.processes.share(job.batches())
    layers = len(DecoderStack(job.moe_model.model, job.moe_model.layers[0]))
    total = {"fisher": 2 * layers - job.moe_model.layers[0].decoder_layer, "output": layers}
    # For fisher each layer runs forward, and again with gradients, its experts once more.
    passes, factor = (2, 4) if profile.metric == "fisher" else (1, 1)
    factor += len(profile.bits) + bool(profile.bits)  # each width, and floats to compare with
    gflop = factor * forward_gflop(job.moe_model, job.calibration.tokens)
    job.tell_time(profile, passes=passes, gflop=gflop)
    with torch.inference_mode(mode=False), torch.no_grad():
        reduced = job.reduced(profile)
        steps = total.get(profile.metric, len(job.moe_model.layers))
        with progress_in_units(job.console, steps, unit="layers") as advance:
            zeros = functools.partial(job.zeros, profile)
            run = StreamedRun(job.moe_model, batches, states, job.processes, advance, zeros)
            if profile.metric == "fisher":
                return run.fisher(FisherRun(job.moe_model, reduced, seed=profile.seed))
            if profile.metric == "output":
                return run.output(OutputRun(job.moe_model, reduced))
            return run.data_free(OutputRun(job.moe_model, reduced), profile.seed)


def _completed(
    job: Job, profile: SensitivityProfile, rows: Sequence[Sequence[float]], loss: float
) -> SensitivityProfile:
    """Return the profile that sums over all windows give, and save it."""
    pairs = zip(job.moe_model.layers, rows, strict=True)
    sums = [LayerSums.of(layer, row, widths=profile.widths) for layer, row in pairs]
    profile = dataclasses.replace(
        profile,
        costs=tuple(_costs(profile, each) for each in sums),
        expert_sizes=tuple(each.sizes() for each in sums),
        baseline_loss=loss / job.calibration.ids[:, 1:].size,
        partial=None,
    )
    job.save(profile)
    return profile


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


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise UnsupportedModelError(
            f"The model's loss on the calibration text is {loss}: its weights are broken."
        )
    return loss
