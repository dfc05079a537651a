"""Goal -> the plan that meets it: the best one within bytes, or the smallest within a loss.

Both choose from the same frontier. Its bytes are counted; its costs are sensitivities in nats, for
one common threshold half the squares of the scores that it drops. To these comes what all experts
of the rounded model add to the loss, which is measured. A loss is measured for every plan that is
made, and what the next one is predicted to add goes by that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.correction.trials import CorrectionTrials, Running
from alloc_moe.compiler.errors import BudgetError
from alloc_moe.compiler.model.layer_progress import layers_progress
from alloc_moe.compiler.planning.allocation import parse_budget, profiled_costs
from alloc_moe.compiler.planning.goals.frontier import Choice, Frontier
from alloc_moe.compiler.planning.plan import expert_sizes, running_on_text
from alloc_moe.compiler.planning.thresholds import Setting, dropped_costs
from alloc_moe.compiler.records import COMMON
from alloc_moe.compiler.reference.policies import LayerParameters
from alloc_moe.compiler.rounding.weights import with_float_experts
from alloc_moe.compiler.sensitivity.token_sizes.choosing import NEEDLESS, NO_ROOM, leave_out
from alloc_moe.runtime.artifact.plan import Budget

if TYPE_CHECKING:
    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.planning.goals.planner import Planner
    from alloc_moe.compiler.planning.goals.traffic import WeightsRead
    from alloc_moe.compiler.records import Correction, Goal, Planned, PlanOptions
    from alloc_moe.runtime.console import Console

_TRIES = 4  # plans made for a loss, at most
_NEAR = 0.9  # of the loss asked for: not worth another plan
_LEAST_STEP = 1 / 4  # of the scale of predictions, where a correction made up for more than all
_WORTH = 0.06  # of what experts may read: maps of token sizes lower the loss as so many more do
_TOKENS_PER_BATCH = 4096


def by_activations(options: PlanOptions) -> bool:
    """Whether a number of activations says all of a plan: it is divided by itself, or evenly."""
    return options.redistribution in COMMON or options.allocation == "uniform"


def reachable(goal: Goal, reading: WeightsRead, *, needs_token_sizes: bool) -> WeightsRead:
    """Return what a token reads, without token sizes where they stand in the way of a goal.

    That is where their maps leave no room for all experts, or for any plan with a correction's
    shifts; where as many bytes of experts lower the loss more (for a loss, whose bytes aren't known
    yet, of half of the experts); and where all experts run without a dial, which asks for no sizes.
    A plan without maps need have no shifts.

    Args:
        goal: What is asked for.
        reading: What a token reads, with the maps if there shall be some.
        needs_token_sizes: Whether there have to be.

    Raises:
        BudgetError: A token reads more than the bytes asked for under every plan.
    """
    if goal.kind != "bytes":
        pays = reading.token_sizes <= _WORTH * sum(reading.trained) / 2
        return reading if pays or needs_token_sizes else dataclasses.replace(reading, token_sizes=0)
    experts = float(reading.costs(shifted=False).cheapest)
    shifted = float(reading.costs(shifted=True).cheapest)
    full = dataclasses.replace(reading, token_sizes=0).most
    if full <= goal.most and not reading.dial:
        return dataclasses.replace(reading, token_sizes=0)
    pays = reading.token_sizes <= _WORTH * (goal.most - reading.always)
    some = pays and reading.always + shifted <= goal.most < full
    if not (some or reading.most <= goal.most or needs_token_sizes):
        reading = dataclasses.replace(reading, token_sizes=0)
    if goal.most < reading.always + experts:
        raise _too_few_bytes(goal, reading, reading.always + experts)
    return reading


def tell_left_out(goal: Goal, wanted: WeightsRead, found: WeightsRead, console: Console) -> None:
    """Tell why `reachable` left maps out of what a token reads, if it did."""
    if found.token_sizes == wanted.token_sizes:
        return
    room = wanted.always + float(wanted.costs(shifted=True).cheapest)
    if goal.kind == "bytes" and not found.dial and found.most <= goal.most:
        reason = NEEDLESS
    elif goal.kind == "loss" or room <= goal.most < found.most:
        reason = (
            f"would take {wanted.token_sizes} of the bytes that a token reads, in which more "
            "experts lower the loss further; --token-sizes keeps them"
        )
    else:
        reason = NO_ROOM
    leave_out(reason, console)


def _too_few_bytes(goal: Goal, reading: WeightsRead, least: float) -> BudgetError:
    maps = f", {reading.token_sizes} of these for --token-sizes" if reading.token_sizes else ""
    return BudgetError(
        f"--target-bytes is {goal.most:.0f}, but with one expert in each MoE layer a token "
        f"reads {math.ceil(least)} bytes of weights already, {reading.always} of them not of "
        f"routed experts{maps}. Give {math.ceil(least)} to {math.ceil(reading.most)}, which all "
        f"experts take, or another --dtype{', or leave --token-sizes out' if maps else ''}."
    )


def full_loss(moe: MoeModel, calibration: CalibrationSet, console: Console) -> float:
    """Return the loss of a model that runs every expert, in nats per calibration token."""
    running = Running(
        [LayerParameters(layer.experts_per_token) for layer in moe.layers], "none", "keep"
    )
    with layers_progress(console, "Measuring the full model's loss", moe, passes=1):
        return _loss(moe, calibration, running, [None] * len(moe.layers))


def meet_goal(
    goal: Goal, planner: Planner, reading: WeightsRead, loss: float
) -> tuple[MoeModel, Planned]:
    """Return the plan that meets a goal, and the model with the bits that it chose.

    Args:
        goal: What to meet. It is reachable as far as `reachable` says.
        planner: What plans are made from.
        reading: What a token reads.
        loss: The unrounded full model's, from `full_loss`; for a goal of bytes it isn't looked at.

    Raises:
        BudgetError: No plan was found that adds so little to the loss, or reads so few bytes.
        ProfileError: The profile doesn't suit the model or the redistribution.
    """
    search = _Search(goal, planner, reading, _frontier(goal, planner, reading))
    if goal.kind == "bytes":
        return search.within_bytes()
    assert planner.profile is not None
    return search.within_loss(loss, planner.profile.baseline_loss - loss)


def _frontier(goal: Goal, planner: Planner, reading: WeightsRead) -> Frontier:
    table = reading.costs(shifted=planner.options.correction == "affine")
    if not by_activations(planner.options):
        assert planner.profile is not None
        return Frontier(table.prices, profiled_costs(planner.profile, planner.moe.layers))
    most = planner.experts_per_token
    nbytes = _bytes_at_most(table.prices)
    # Where all experts run nothing is corrected, and without a dial there are no maps.
    nbytes[-1] = sum(reading.trained) - reading.token_sizes * (not reading.dial)
    costs = [float(sum(most) - n) for n in range(len(most), sum(most) + 1)]
    if goal.kind == "loss":
        assert planner.profile is not None
        sizes = expert_sizes(planner.options.redistribution, planner.profile, planner.moe)
        setting = Setting(
            planner.options.redistribution,
            planner.options.weights,
            sizes,
            token_sizes=planner.token_sizes,
        )
        with layers_progress(planner.console, "Predicting losses", planner.moe, passes=1):
            ids = torch.from_numpy(planner.calibration.ids)
            costs = dropped_costs(planner.moe, ids, setting)
    return Frontier([nbytes], [costs])


def _bytes_at_most(prices: Sequence[Sequence[float]]) -> list[float]:
    """Return what numbers of activations read, from one per layer on, in the dearest layers."""
    found = [sum(row[0] for row in prices)]
    for more in sorted((row[0] for row in prices for _ in row[1:]), reverse=True):
        found.append(found[-1] + more)
    return found


@dataclass(frozen=True)
class _Made:
    """A plan that was made, its model, and the bytes that a token reads under it."""

    moe: MoeModel
    planned: Planned
    nbytes: float


@dataclass(frozen=True)
class _Search:
    """Makes plans of a frontier's choices until one meets the goal."""

    goal: Goal
    planner: Planner
    reading: WeightsRead
    frontier: Frontier

    def within_bytes(self) -> tuple[MoeModel, Planned]:
        """Return the plan that costs least of those that read no more than the goal."""
        room = self.goal.most - self.reading.always
        # What the full model reads has no shifts, which the layers' own choices count. Nor may one
        # expert in each layer get them, though it counts them too.
        full = self.goal.most >= self.reading.most
        least = self.frontier.least
        choice = self.frontier.best() if full else self.frontier.within(max(room, least))
        made = self._make(choice, self.planner.moe)
        # Thresholds keep to the sum of all k, not to each: where layers differ that may be more
        # bytes. One expert in each layer is kept exactly, so this ends.
        while made.nbytes > self.goal.most:
            if choice.nbytes <= least:
                raise _too_few_bytes(self.goal, self.reading, made.nbytes)
            less = choice.nbytes - (made.nbytes - self.goal.most)
            choice = self.frontier.within(max(less, least))
            made = self._make(choice, made.moe)
        return self._told(made, choice, {})

    def within_loss(self, full: float, base: float) -> tuple[MoeModel, Planned]:
        """Return the plan of the fewest bytes that was measured to add no more than the goal.

        Args:
            full: The loss of the unrounded full model.
            base: What the model of the profile adds to it with all experts.
        """
        moe, scale = self.planner.moe, 1.0
        tried: dict[Choice, tuple[float, float]] = {}  # what they add, predicted and measured
        found: tuple[Choice, _Made] | None = None
        while len(tried) < _TRIES:
            choice = self.frontier.costing((self.goal.most - base) / scale)
            choice = choice or self.frontier.best()
            # Where predictions say no more, a correction may do better than they know.
            if choice in tried:
                choice = self._between(found)
            if choice in tried:
                break
            made = self._make(choice, moe)
            measured = self._added(made, full)
            tried[choice] = base + scale * choice.cost, measured
            self.planner.console.note(
                f"A plan of {round(made.nbytes)} bytes per token adds {measured:.4g} nats, "
                f"predicted {tried[choice][0]:.4g}"
            )
            if measured <= self.goal.most and (found is None or made.nbytes < found[1].nbytes):
                found = choice, made
            moe = made.moe
            if _NEAR * self.goal.most <= measured <= self.goal.most:
                break
            if choice.cost > 0:
                scale = max((measured - base) / choice.cost, scale * _LEAST_STEP)
        if found is None:
            raise self._unreached(tried)
        choice, made = found
        predicted, measured = tried[choice]
        if made.moe is not moe and self.planner.formats:
            made = self._make(choice, moe)  # another plan's bits were tried since
        facts = {"added_loss_predicted": predicted, "added_loss": measured}
        return self._told(made, choice, facts)

    def _between(self, found: tuple[Choice, _Made] | None) -> Choice:
        """Return the smallest choice, or one halfway from there to what was found to do."""
        least = self.frontier.least
        return self.frontier.within(least if found is None else (least + found[0].nbytes) / 2)

    def _make(self, choice: Choice, moe: MoeModel) -> _Made:
        """Make the plan of a choice, of a model whose experts another plan may have rounded."""
        planner = self.planner
        if planner.formats and moe.quantization is not None and moe.quantization.experts:
            planner = dataclasses.replace(planner, moe=with_float_experts(moe))
        most = planner.experts_per_token
        if by_activations(planner.options):
            number = len(most) - 1 + choice.choices[0]  # the first is one expert in each layer
            moe, planned = planner.of_budget(parse_budget(number, most), None)
        else:
            costs = self.reading.costs(shifted=planner.options.correction == "affine")
            # The next larger share, as it is multiplied back. What is planned has activations of
            # its own; these only say that not all run.
            share = math.nextafter(choice.nbytes / float(costs.original), math.inf)
            budget = Budget(share, len(most), sum(most))
            moe, planned = planner.of_choices(budget, costs, choice.choices)
        return _Made(moe, planned, self._counted(moe, planned))

    def _counted(self, moe: MoeModel, planned: Planned) -> float:
        widths = [0] * len(moe.layers)
        if self.planner.formats:
            assert moe.quantization is not None
            pairs = zip(self.planner.formats, moe.quantization.experts, strict=True)
            widths = [list(forms).index(form) for forms, form in pairs]
        return self.reading.counted(planned.plan, planned.corrections, widths)

    def _added(self, made: _Made, full: float) -> float:
        plan, corrections = made.planned.plan, made.planned.corrections
        with layers_progress(self.planner.console, "Measuring the loss", made.moe, passes=1):
            running = running_on_text(plan)
            return _loss(made.moe, self.planner.calibration, running, corrections) - full

    def _told(
        self, made: _Made, choice: Choice, facts: dict[str, float]
    ) -> tuple[MoeModel, Planned]:
        target = {
            "asked": self.goal.kind,
            "most": self.goal.most,
            "bytes": round(made.nbytes),
            "bytes_predicted": round(self.reading.always + choice.nbytes),
            "bytes_original": round(self.reading.original),
            **facts,
        }
        plan = dataclasses.replace(made.planned.plan, target=target)
        return made.moe, dataclasses.replace(made.planned, plan=plan)

    def _unreached(self, tried: dict[Choice, tuple[float, float]]) -> BudgetError:
        nearest = min(measured for _, measured in tried.values())
        return BudgetError(
            f"--target-loss {self.goal.most:g} wasn't reached: of the plans tried ({len(tried)}) "
            f"the nearest adds {nearest:.4g} nats per token on the calibration text, in "
            f"{self.reading.dtype}. Give {_above(nearest):g} or more, or another --dtype."
        )


def _above(loss: float) -> float:
    """Return a loss of three digits that is above the given one."""
    step = 10.0 ** (math.floor(math.log10(abs(loss) or 1.0)) - 2)
    return (math.floor(loss / step) + 1) * step


@torch.inference_mode()
def _loss(
    moe: MoeModel,
    calibration: CalibrationSet,
    running: Running,
    corrections: Sequence[Correction | None],
) -> float:
    ids = torch.from_numpy(calibration.ids)
    trials = CorrectionTrials(moe, ids, running, tokens_per_batch=_TOKENS_PER_BATCH)
    return trials.losses(corrections).double().mean().item()
