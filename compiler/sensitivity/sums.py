"""Sums over tokens that the costs and expert sizes of `output` and `fisher` are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alloc_moe.compiler.records import MoeLayer
from alloc_moe.compiler.workspace.processes import Processes


@dataclass
class LayerSums:
    """Sums over tokens, in float64, of one MoE layer.

    The cost of k experts is ``costs[k - 1] / whole``; with several widths of weights come first all
    k in the first of them, then all k in the next. The size of expert e is the root of
    ``squares[e] / counts[e]``, the mean over the tokens that have e among their candidates.
    """

    costs: torch.Tensor  # [widths * candidates]
    whole: torch.Tensor  # [1]
    squares: torch.Tensor  # [experts]
    counts: torch.Tensor  # [experts]

    @classmethod
    def of(
        cls, layer: MoeLayer, row: Sequence[float] | None = None, *, widths: int = 1
    ) -> LayerSums:
        """Return the sums that `row` gave, or zeros."""
        lengths = [widths * layer.experts_per_token, 1, layer.num_experts, layer.num_experts]
        flat = torch.zeros(sum(lengths)) if row is None else torch.tensor(row, dtype=torch.float64)
        return cls(*(part.clone() for part in torch.split(flat.double(), lengths)))

    def row(self) -> tuple[float, ...]:
        """Return all sums in one row, from which `of` makes the same again."""
        return tuple(torch.cat([self.costs, self.whole, self.squares, self.counts]).tolist())

    def add_pairs(self, ids: torch.Tensor, squares: torch.Tensor) -> None:
        """Add the squares [tokens, candidates] of what single experts add to the output."""
        ids, experts = ids.flatten(), len(self.counts)
        self.squares += torch.bincount(ids, squares.flatten().double(), minlength=experts)
        self.counts += torch.bincount(ids, minlength=experts)

    def mean_costs(self) -> tuple[float, ...]:
        """Return the costs of k = 1..K, in every width."""
        return tuple((self.costs / self.whole).tolist())

    def sizes(self) -> tuple[float, ...]:
        """Return the experts' sizes; one that was never a candidate gets the mean of all squares.

        That is the root mean square over all (token, candidate) pairs of the layer, so that an
        expert which the calibration text never needed is neither free nor forbidden.
        """
        layer = self.squares.sum() / self.counts.sum()
        means = torch.where(self.counts > 0, self.squares / self.counts.clamp(min=1), layer)
        return tuple(means.sqrt().tolist())


def reduced_rows(
    rows: Sequence[Sequence[float]], sums: Sequence[LayerSums], processes: Processes
) -> tuple[tuple[float, ...], ...]:
    """Return, layer by layer, `rows` plus what all processes have in `sums`."""
    lengths = [len(row) for row in rows]
    added = processes.add(_flat([each.row() for each in sums]))
    before = _flat(rows)
    return tuple(tuple(part.tolist()) for part in torch.split(before + added, lengths))


def _flat(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)
