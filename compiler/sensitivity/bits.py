"""What a layer gives at k experts in 4 or 8 bits while its sensitivity is measured.

The layer runs k experts with rounded weights against all K in float32. All other layers' experts
are floats, as their bits are not chosen yet, and everything but experts is rounded as the artifact
has it. One layer at a time has its weights rounded beside the floats, once per batch and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.rounding.weights import rounded_experts
from alloc_moe.compiler.sensitivity.corrected import Reduced, all_pairs, fit_every_k
from alloc_moe.compiler.sensitivity.kept import make_keep

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import CorrectionMode, Redistribution
    from alloc_moe.compiler.workspace.processes import Processes
    from alloc_moe.passes.blockwise import BlockFormat


@dataclass(frozen=True)
class Rounded:
    """Layers that run some of their candidates, with weights of any of some widths.

    ``formats[l]`` are those of MoE layer l of the model, ``reduced`` what runs of it in each width.
    """

    moe_model: MoeModel
    formats: Sequence[Sequence[BlockFormat]]
    reduced: Sequence[Reduced]

    def changes(
        self,
        layer: int,
        experts: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> Iterator[torch.Tensor]:
        """Yield by how much the layer's outputs [T, H] change: at every k of every width, in order.

        Args:
            layer: The index of the MoE layer.
            experts: Its experts, in floats.
            hidden: What enters them [T, H], T being whole windows.
            ids: The candidates' experts [T, K], ranked.
            weights: Their weights [T, K].
        """
        full = all_pairs(experts, hidden, ids, weights).sum(1)
        name = self.moe_model.layers[layer].experts_name
        for form, reduced in zip(self.formats[layer], self.reduced, strict=True):
            with rounded_experts(self.moe_model, name, form):
                pairs = all_pairs(experts, hidden, ids, weights)
            for k in range(1, ids.shape[1] + 1):
                yield reduced.outputs(layer, k, pairs, weights, ids) - full


def make_rounded(
    moe_model: MoeModel,
    batches: Sequence[torch.Tensor],
    redistribution: Redistribution,
    correction: CorrectionMode,
    formats: Sequence[Sequence[BlockFormat]],
    processes: Processes,
) -> Rounded:
    """Return the layers at k in every width, under a measured redistribution and correction.

    Args:
        moe_model: The model, its experts in floats.
        batches: This process's calibration windows, as [windows, sequence].
        redistribution: One that `measured_redistribution` returns.
        correction: One that `measured_correction` returns.
        formats: The widths of each MoE layer's experts.
        processes: Those that have the other windows.
    """
    keep = make_keep(moe_model, batches, redistribution, processes)
    by_width = list(zip(*formats, strict=True))
    if correction == "none":
        return Rounded(moe_model, formats, [Reduced(keep)] * len(by_width))
    fitted = [
        fit_every_k(moe_model, batches, Reduced(keep), correction, processes, width)
        for width in by_width
    ]
    return Rounded(moe_model, formats, [Reduced(keep, corrections) for corrections in fitted])
