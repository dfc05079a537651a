"""What is measured on what, by whom, and where that is told and saved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.model.layer_progress import expected_time, layers_progress
from alloc_moe.compiler.records import SCORED
from alloc_moe.compiler.sensitivity.bits import Rounded, make_rounded
from alloc_moe.compiler.sensitivity.corrected import Reduced, make_reduced
from alloc_moe.compiler.sensitivity.sums import LayerSums
from alloc_moe.compiler.workspace.files import save_text

if TYPE_CHECKING:
    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import CorrectionMode, Redistribution, SensitivityProfile
    from alloc_moe.compiler.sensitivity.layerwise import Batch
    from alloc_moe.compiler.workspace.processes import Processes
    from alloc_moe.passes.blockwise import BlockFormat
    from alloc_moe.runtime.console import Console

_TOKENS_PER_BATCH = 1024  # of the metrics that take one pass: bounds the memory of activations


@dataclass(frozen=True)
class Job:
    """What is measured on what, and by whom."""

    moe_model: MoeModel
    calibration: CalibrationSet
    formats: Sequence[Sequence[BlockFormat]]
    path: Path | None
    console: Console | None
    processes: Processes

    def save(self, profile: SensitivityProfile) -> None:
        if self.path is not None and self.processes.writes:
            save_text(profile.to_json() + "\n", self.path, what="The profile")

    def tell_time(self, profile: SensitivityProfile, *, passes: float, gflop: float) -> None:
        """Say what a profile will take, if layers are read each time that they run."""
        if self.console is None or self.moe_model.offloading is None:
            return
        passes += _passes_before(profile)
        share = gflop / self.processes.size
        time_needed = expected_time(self.moe_model, passes=passes, gflop=share)
        self.console.note(f"Profiling by {profile.metric} will take {time_needed}")

    def batches(self) -> list[Batch]:
        """Return the calibration windows, as many at a time as one pass takes."""
        ids = torch.from_numpy(self.calibration.ids).to(self.moe_model.model.device)
        windows = max(1, _TOKENS_PER_BATCH // self.calibration.sequence_length)
        windows = min(windows, max(1, len(ids) // self.processes.size))
        return [(first, ids[first : first + windows]) for first in range(0, len(ids), windows)]

    def zeros(self, profile: SensitivityProfile) -> list[LayerSums]:
        return [LayerSums.of(layer, widths=profile.widths) for layer in self.moe_model.layers]

    def setting(
        self, profile: SensitivityProfile
    ) -> tuple[MoeModel, list[torch.Tensor], Redistribution, CorrectionMode]:
        batches = [ids for _, ids in self.processes.share(self.batches())]
        return self.moe_model, batches, profile.redistribution, profile.correction

    def reduced(self, profile: SensitivityProfile) -> Reduced | Rounded:
        with self._deciding(profile):
            if self.formats:
                return make_rounded(*self.setting(profile), self.formats, self.processes)
            return make_reduced(*self.setting(profile), self.processes)

    def _deciding(self, profile: SensitivityProfile) -> contextlib.AbstractContextManager[None]:
        """Report the passes that come before the profile, if they take long."""
        passes, moe_model = _passes_before(profile), self.moe_model
        if not passes or self.console is None or moe_model.offloading is None:
            return contextlib.nullcontext()
        described = "Deciding what runs at each k"
        return layers_progress(self.console, described, moe_model, passes=passes)


def _passes_before(profile: SensitivityProfile) -> int:
    """Passes over the text that thresholds and corrections of each k take."""
    scored = profile.redistribution in SCORED
    return scored + (profile.correction != "none") * profile.widths


@contextlib.contextmanager
def progress_in_units(
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
