"""The least squares behind corrections, from sums over tokens: memory doesn't grow with tokens."""

from __future__ import annotations

import torch

from alloc_moe.compiler.records import Correction
from alloc_moe.compiler.reference.experts import dense_weights
from alloc_moe.compiler.workspace.processes import Processes

_RIDGE_SCALE = 1e-3  # relative to a dimension's mean square
_RIDGE_BIAS = 10.0  # per expert and token, relative to the mean square of the experts' weights


class CorrectionSums:
    """Sums over tokens of the routed output y, the weights W of the kept experts, and what y lacks.

    Args:
        experts: How many experts the layer has; 0 if only a gain will be fitted.
    """

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._tokens = 0
        self._yy = self._ym = torch.zeros((), dtype=torch.float64)  # [H] later
        self._ww = self._wy = self._wm = torch.zeros((), dtype=torch.float64)  # [E, E], [E, H]

    def add(
        self,
        outputs: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        missing: torch.Tensor,
        importance: torch.Tensor | None = None,
    ) -> None:
        """Add tokens.

        Args:
            outputs: What the kept experts give [T, H].
            ids: The candidates' experts [T, K].
            weights: Their weights [T, K], zero where dropped.
            missing: What the outputs lack [T, H].
            importance: How much the square of a token's error counts [T]; the same by default.
        """
        self._tokens += len(outputs)
        root = 1.0 if importance is None else importance.double().sqrt()[:, None]
        y, m = outputs.double() * root, missing.double() * root
        self._yy = self._yy + (y * y).sum(0)
        self._ym = self._ym + (y * m).sum(0)
        if self._experts:
            w = dense_weights(ids, weights, self._experts).double() * root
            self._ww = self._ww + w.T @ w
            self._wy = self._wy + w.T @ y
            self._wm = self._wm + w.T @ m

    def reduce(self, processes: Processes) -> None:
        """Add the sums that the other processes have."""
        if processes.size == 1:
            return
        self._tokens = int(processes.add(torch.tensor([self._tokens], dtype=torch.float64)).item())
        for name in ("_yy", "_ym", "_ww", "_wy", "_wm"):
            setattr(self, name, processes.add(getattr(self, name)))

    def gain(self) -> Correction:
        """Return the one factor g that minimises |g y - (y + missing)|^2."""
        gain = 1 + self._ym.sum() / self._yy.sum().clamp(min=1e-30)
        return Correction(gain.expand(len(self._yy)).float().cpu().numpy().copy(), None)

    def affine(self) -> Correction:
        """Return scale s [H] and bias B [E, H] that minimise |s y + W B - (y + missing)|^2.

        With a ridge that draws s to 1 and B to 0. B is eliminated first: its normal matrix
        [E, E] is the same for every dimension.
        """
        share = _RIDGE_BIAS * self._experts / self._tokens  # little text is trusted little
        ridge = share * self._ww.diagonal().mean().clamp(min=1e-30)
        normal = self._ww + ridge * torch.eye(self._experts, dtype=torch.float64).to(self._ww)
        solved = torch.linalg.solve(normal, torch.cat([self._wy, self._wm], dim=1))
        of_outputs, of_missing = solved.chunk(2, dim=1)  # [E, H] each
        explained = self._yy * (1 + _RIDGE_SCALE) - (self._wy * of_outputs).sum(0)
        scale = (self._ym - (self._wm * of_outputs).sum(0)) / explained.clamp(min=1e-30)
        bias = of_missing - of_outputs * scale
        return Correction((1 + scale).float().cpu().numpy(), bias.float().cpu().numpy())
