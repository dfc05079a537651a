"""What makes every plan of a compile: of a budget, or of a choice in each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alloc_moe.compiler.planning.mixed_bits import (
    MixedAllocation,
    allocate_mixed,
    mixed_allocation,
)
from alloc_moe.compiler.planning.plan import expert_sizes, make_planned
from alloc_moe.compiler.rounding.formats import formats_of_bits
from alloc_moe.compiler.rounding.weights import with_expert_formats
from alloc_moe.compiler.sensitivity.token_sizes.choosing import fit_if_possible
from alloc_moe.compiler.sensitivity.token_sizes.kept import token_sizes_path

if TYPE_CHECKING:
    from pathlib import Path

    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.planning.costs import CostTable
    from alloc_moe.compiler.planning.refinement import Refinement
    from alloc_moe.compiler.records import (
        CompileOptions,
        Planned,
        PlanOptions,
        SensitivityProfile,
    )
    from alloc_moe.passes.blockwise import BlockFormat
    from alloc_moe.runtime.artifact.plan import Budget
    from alloc_moe.runtime.artifact.token_sizes import TokenSizes
    from alloc_moe.runtime.console import Console


@dataclass(frozen=True)
class Planner:
    """Makes plans of what they all have in common.

    With ``formats``, those that each MoE layer's experts may be stored in, the experts of ``moe``
    are floats; a plan's own model then has them rounded, in place.
    """

    moe: MoeModel
    calibration: CalibrationSet
    options: PlanOptions
    profile: SensitivityProfile | None
    formats: Sequence[Sequence[BlockFormat]]
    refinement: Refinement | None
    console: Console
    token_sizes: tuple[TokenSizes, ...] | None = None

    @property
    def experts_per_token(self) -> list[int]:
        """K of each MoE layer."""
        return [layer.experts_per_token for layer in self.moe.layers]

    def of_budget(self, budget: Budget, costs: CostTable | None) -> tuple[MoeModel, Planned]:
        """Return the plan that spends a budget best, and the model with the bits it chose.

        Args:
            budget: As `parse_budget` returned it.
            costs: What experts use up, where that isn't activations; with formats from
                `mixed_costs`.

        Raises:
            BudgetError: The cheapest plan is above the budget.
            ProfileError: The profile doesn't suit the model or the redistribution.
        """
        if not self.formats:
            return self.moe, self._planned(self.moe, budget, self.profile, costs, None)
        assert self.profile is not None
        assert costs is not None
        return self._mixed(budget, allocate_mixed(self.profile, self.moe.layers, budget, costs))

    def of_choices(
        self, budget: Budget, costs: CostTable, choices: Sequence[int]
    ) -> tuple[MoeModel, Planned]:
        """Return the plan of one choice per layer, counted as in the rows of its costs.

        Arguments and errors are otherwise those of `of_budget`.
        """
        if not self.formats:
            return self.moe, self._planned(self.moe, budget, self.profile, costs, choices)
        assert self.profile is not None
        mixed = mixed_allocation(self.profile, self.moe.layers, costs, choices)
        return self._mixed(budget, mixed)

    def _mixed(self, budget: Budget, mixed: MixedAllocation) -> tuple[MoeModel, Planned]:
        with self.console.step("Rounding experts"):
            moe = with_expert_formats(self.moe, formats_of_bits(self.formats, mixed.bits))
        planned = self._planned(moe, budget, mixed.profile, mixed.costs, mixed.ks)
        return moe, dataclasses.replace(planned, plan=mixed.mark(planned.plan))

    def _planned(
        self,
        moe: MoeModel,
        budget: Budget,
        profile: SensitivityProfile | None,
        costs: CostTable | None,
        allocation: Sequence[int] | None,
    ) -> Planned:
        return make_planned(
            moe,
            self.calibration,
            budget,
            self.options,
            profile=profile,
            token_sizes=self.token_sizes,
            costs=costs,
            allocation=allocation,
            refinement=self.refinement,
            console=self.console,
        )


def token_sizes_of(
    profile: SensitivityProfile,
    path: Path,
    options: CompileOptions,
    moe: MoeModel,
    calibration: CalibrationSet,
    console: Console,
) -> tuple[TokenSizes, ...] | None:
    """Return what tokens multiply a profile's sizes by, fitted or kept beside its file.

    None where nothing can be fitted and nobody asked, which is told.

    Raises:
        TokenSizesError: Nothing can be fitted, and it was asked for.
        ProfileError: The profile has no sizes of this model, or what is kept is damaged.
    """
    sizes = expert_sizes("price", profile, moe)
    assert sizes is not None
    return fit_if_possible(options, moe, calibration, sizes, token_sizes_path(path), console)
