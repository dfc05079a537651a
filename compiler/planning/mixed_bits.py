"""Profile and budget -> experts and bits of each layer: ``--mixed-bits``.

The knapsack of `allocate` takes any choices with costs and prices. Here those of a layer are all k
in the fewest bits, then all k in the next, in the order of a profile's and a cost table's rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alloc_moe.compiler.errors import ProfileError
from alloc_moe.compiler.planning.allocation import allocate

if TYPE_CHECKING:
    from alloc_moe.compiler.planning.costs import CostTable
    from alloc_moe.compiler.records import MoeLayer, SensitivityProfile
    from alloc_moe.runtime.artifact.plan import AllocationPlan, Budget


@dataclass(frozen=True)
class MixedAllocation:
    """Experts per token and their bits in each MoE layer.

    ``profile`` and ``costs`` are those of all k in these bits.
    """

    ks: tuple[int, ...]
    bits: tuple[int, ...]
    profile: SensitivityProfile
    costs: CostTable

    def mark(self, plan: AllocationPlan) -> AllocationPlan:
        """Return the plan with the bits of its layers."""
        layers = zip(plan.layers, self.bits, strict=True)
        marked = tuple(dataclasses.replace(layer, bits=bits) for layer, bits in layers)
        return dataclasses.replace(plan, layers=marked)


def allocate_mixed(
    profile: SensitivityProfile,
    layers: Sequence[MoeLayer],
    budget: Budget,
    costs: CostTable,
) -> MixedAllocation:
    """Return the experts and bits per layer that cost least in quality within the budget, exactly.

    Of equal costs the fewest bytes are taken.

    Args:
        profile: What fewer experts of fewer bits cost each layer in quality.
        layers: The model's MoE layers.
        budget: Of bytes, as `parse_budget` returned it.
        costs: From `mixed_costs`, for the profile's bits.

    Raises:
        BudgetError: The cheapest plan is above the budget.
        ProfileError: The profile is of other layers or has no bits, is incomplete, or holds a cost
            that is no number.
    """
    if not profile.bits:
        raise ProfileError(
            "The sensitivity profile has costs of experts in one width only, and mixed bits need "
            "those of several. Give another path for it."
        )
    return mixed_allocation(profile, layers, costs, allocate(profile, layers, budget, costs))


def mixed_allocation(
    profile: SensitivityProfile,
    layers: Sequence[MoeLayer],
    costs: CostTable,
    choices: Sequence[int],
) -> MixedAllocation:
    """Return the experts and bits that choices stand for, one per layer, counted as in its rows."""
    most = [layer.experts_per_token for layer in layers]
    found = [divmod(choice - 1, k) for choice, k in zip(choices, most, strict=True)]
    starts = [width * k for (width, _), k in zip(found, most, strict=True)]

    def chosen(rows: Sequence[tuple[float, ...] | None]) -> tuple[tuple[float, ...], ...]:
        parts = zip(rows, starts, most, strict=True)
        return tuple(row[start : start + k] for row, start, k in parts if row is not None)

    return MixedAllocation(
        tuple(k_before + 1 for _, k_before in found),
        tuple(profile.bits[width] for width, _ in found),
        dataclasses.replace(profile, costs=chosen(profile.costs), bits=()),
        dataclasses.replace(costs, prices=chosen(costs.prices)),
    )
