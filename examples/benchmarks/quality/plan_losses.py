"""What a plan really costs: the loss that it adds in PyTorch, kept from run to run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.correction.fitting import fit_corrections
from alloc_moe.compiler.correction.trials import Running
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import Correction, CorrectionMode, Redistribution
from alloc_moe.compiler.reference.experts import allocated
from alloc_moe.compiler.reference.policies import LayerParameters

Correct = Callable[[Sequence[int]], Sequence[Correction | None]]
_TOKENS_PER_BATCH = 2048  # one call; each of its windows shares its own activations


def corrector(
    moe: MoeModel,
    calibration: CalibrationSet,
    redistribution: Redistribution,
    mode: CorrectionMode,
) -> Correct:
    """Return what fits corrections to a plan, as a compile does."""
    ids = torch.from_numpy(calibration.ids)

    def fit(plan: Sequence[int]) -> Sequence[Correction | None]:
        running = Running([LayerParameters(k) for k in plan], redistribution, "keep")
        return fit_corrections(moe, ids, running, mode=mode).layers

    return fit


class Losses:
    """The loss that plans add to the full model's on a text, saved after each."""

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        moe: MoeModel,
        ids: np.ndarray[Any, Any],
        correct: Correct | None = None,
    ) -> None:
        """Continue the file at `path` if there is one; of other settings it ends the program."""
        self._path, self._moe, self._ids = path, moe, torch.from_numpy(ids)
        self._found: dict[str, Any] = {"settings": dict(settings), "losses": {}}
        if path.exists():
            self._found = json.loads(path.read_text())
            if self._found["settings"] != settings:
                sys.exit(f"{path} has the results of other settings. Delete it or name another.")
        self._redistribution: Redistribution = settings["redistribution"]
        self._correct = correct
        self._full = [layer.experts_per_token for layer in moe.layers]

    def added(self, plan: Sequence[int]) -> float:
        """Return the plan's loss less the full model's, in nats per token."""
        return self._loss(plan) - self._loss(self._full)

    def _loss(self, plan: Sequence[int]) -> float:
        name = " ".join(map(str, plan))
        if name not in self._found["losses"]:
            self._found["losses"][name] = self._measure(plan)
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._found, indent=1))
            partial.replace(self._path)
        found: float = self._found["losses"][name]
        return found

    def _measure(self, plan: Sequence[int]) -> float:
        total = 0.0
        parameters = [LayerParameters(k) for k in plan]
        corrections = None
        if self._correct is not None and list(plan) != self._full:
            corrections = self._correct(plan)
        with (
            torch.inference_mode(),
            allocated(
                self._moe.model,
                self._moe.layers,
                parameters,
                redistribution=self._redistribution,
                weights="keep",
                corrections=corrections,
            ) as seen,
        ):
            for ids in self._ids.split(max(1, _TOKENS_PER_BATCH // self._ids.shape[1])):
                logits = self._moe.model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
                losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
                total += losses.double().sum().item()
        if seen.per_token != list(plan):
            sys.exit(f"Executed {seen.per_token} experts per token, planned {plan}")
        return total / self._ids[:, 1:].numel()
