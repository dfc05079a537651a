"""What candidates are kept by, in PyTorch; the graph passes must compute the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alloc_moe.compiler.records import SCORED, Redistribution

TINY = 1e-30
"""What keeps 0 / 0 out where a token's weights are all zero."""


def scores(
    redistribution: Redistribution,
    weights: torch.Tensor,
    ids: torch.Tensor,
    sizes: torch.Tensor | Sequence[float] | None = None,
    overlap: float = 0.0,
) -> torch.Tensor:
    """Return what each candidate is kept by [tokens, candidates], float32.

    Dropping a token's candidates i costs the loss about the square of the sum of what they add.
    With s = size times weight, that is s^2 for one alone; where those ranked after it, of sum t,
    are dropped already, one more costs s (s + 2 overlap t), overlap being the cosine between what
    two experts add. ``price`` compares the root of that.

    The first candidate has a score too, but runs in any case. The artifact does the same float32
    operations in the same order.

    Args:
        redistribution: One of `SCORED`.
        weights: Router weights [tokens, candidates], ranked by `rank_candidates`.
        ids: The candidates' experts [tokens, candidates].
        sizes: For ``price``: what the weights of each expert are multiplied by [experts], or those
            of each token's experts [tokens, experts].
        overlap: For ``price``: 0 takes what experts add for uncorrelated, 1 for parallel.
    """
    weights = weights.float()
    match redistribution:
        case "threshold":
            return weights
        case "ratio":
            return weights / weights[:, :1].clamp(min=TINY)
        case "top-p":
            before = [torch.zeros_like(weights[:, 0])]
            for column in weights[:, :-1].unbind(1):  # torch.cumsum adds in double precision
                before.append(before[-1] + column)
            return -torch.stack(before, dim=1)
        case "price":
            added = sizes_of(sizes, ids) * weights
            if overlap == 0:
                return added
            return (added * (added + sums_after(added) * (2 * overlap))).sqrt()
    raise ValueError(f"{redistribution!r} compares no scores; {', '.join(SCORED)} do.")


def sizes_of(sizes: torch.Tensor | Sequence[float] | None, ids: torch.Tensor) -> torch.Tensor:
    """The candidates' sizes [tokens, candidates], of sizes [experts] or [tokens, experts]."""
    assert sizes is not None
    given = torch.as_tensor(sizes, dtype=torch.float32, device=ids.device)
    return given[ids] if given.dim() == 1 else given.gather(1, ids)


def sums_after(values: torch.Tensor) -> torch.Tensor:
    """The sum of the columns after each [tokens, candidates]."""
    sums = [torch.zeros_like(values[:, 0])]
    for column in reversed(values[:, 1:].unbind(1)):  # torch.cumsum adds in double precision
        sums.append(sums[-1] + column)
    return torch.stack(sums[::-1], dim=1)
