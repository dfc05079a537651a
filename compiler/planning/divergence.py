"""KL(full model || plan) on a text: what a plan costs, with less noise than its loss has."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.planning.thresholds import Setting, common_threshold, layer_thresholds
from alloc_moe.compiler.records import SCORED
from alloc_moe.compiler.reference.experts import allocated, replaced_experts
from alloc_moe.compiler.reference.losses import divergence
from alloc_moe.compiler.reference.policies import LayerParameters

if TYPE_CHECKING:
    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel


class Divergence:
    """Measures KL(full model || plan) on a text, the mean over tokens in nats.

    It has a plan's expected loss increase with far less noise than the loss itself.
    """

    def __init__(self, moe: MoeModel, calibration: CalibrationSet) -> None:
        self._moe = moe
        self._windows = torch.from_numpy(calibration.ids)
        self._stack = DecoderStack(moe.model, moe.layers[0])

    @functools.cached_property
    def _full(self) -> list[torch.Tensor]:
        """The full model's hidden states [tokens, hidden] at the end, per window."""
        with torch.inference_mode(), replaced_experts(self._moe.model, {}):
            return list(self._ends())

    def of_allocation(self, ks: Sequence[int], setting: Setting) -> float:
        """Return the divergence of a k per layer."""
        parameters = [LayerParameters(k) for k in ks]
        if setting.redistribution in SCORED:
            found = layer_thresholds(self._moe, self._windows, setting, ks)
            pairs = zip(ks, found.values, strict=True)
            parameters = [LayerParameters(k, threshold) for k, threshold in pairs]
        return self.measure(parameters, setting)

    def of_price(self, setting: Setting, activations: float) -> float:
        """Return the divergence of ``price`` where it keeps `activations` in the mean."""
        found = common_threshold(self._moe, self._windows, setting, activations)
        parameters = [
            setting.parameters(layer, k, threshold)
            for layer, (k, threshold) in enumerate(zip(found.ks, found.values, strict=True))
        ]
        # Plans that happen to use a little less than others would look a little worse.
        return self.measure(parameters, setting) * (found.activations / activations) ** 2

    @torch.inference_mode()
    def measure(self, parameters: Sequence[LayerParameters], setting: Setting) -> float:
        """Return the divergence of what each layer is given."""
        inputs = ("divergence", self._moe.fingerprint, self._windows, setting, list(parameters))
        found = self._moe.results.recall(inputs, lambda: [self._measure(parameters, setting)])
        return found[0].item() / self._windows.numel()

    def _measure(self, parameters: Sequence[LayerParameters], setting: Setting) -> torch.Tensor:
        """Return the divergence, summed over tokens."""
        total, full_states = 0.0, self._full
        with allocated(
            self._moe.model,
            self._moe.layers,
            parameters,
            redistribution=setting.redistribution,
            weights=setting.weights,
            corrections=setting.corrections,
        ):
            for full, plan in zip(full_states, self._ends(), strict=True):
                total += divergence(self._stack.head, self._moe, full, plan)
        return torch.tensor(total, dtype=torch.float64)

    def _ends(self) -> Iterator[torch.Tensor]:
        """Yield the hidden states [tokens, hidden] at the end, window by window."""
        for end in self._stack.stream((ids, None) for ids in torch.split(self._windows, 1)):
            yield end.flatten(0, 1)
