"""How large what experts add is for one token: predicted from the hidden state that enters them.

An expert's size is a mean over tokens. For a single token the square of g . f_e (see `fisher`) is
that mean times what a linear map of the hidden state says, which is fitted here: with z the square
over the mean, and u the logarithm of the factor on the size, it minimises the mean of
z exp(-2 u) + 2 u. That is the likelihood of a normal g . f_e of that variance, so u tells the
expected square: how much the token minds, and how much the expert adds. Text that isn't fitted to
says when to stop, and whether anything is better than nothing. That is the calibration text itself,
if there is further text: what is measured on it later is then as on any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from alloc_moe.compiler.reference.token_sizes import log_factors

_EPOCHS = 12  # or more, on little text
_LEAST_STEPS = 300
_TOKENS_PER_STEP = 1024
_RATE = 3e-3
_DECAY = 1e-2
_LEAST_SPREAD = 1e-2  # of a dimension, in the mean of all: what hardly varies tells nothing
METHOD = (_EPOCHS, _LEAST_STEPS, _TOKENS_PER_STEP, _RATE, _DECAY, _LEAST_SPREAD)
"""What a fit depends on besides what it is fitted to."""


@dataclass
class Seen:
    """What one layer's tokens gave, batch by batch."""

    hidden: list[torch.Tensor] = field(default_factory=list)  # [T, H] each
    ids: list[torch.Tensor] = field(default_factory=list)  # [T, K] each
    squares: list[torch.Tensor] = field(default_factory=list)  # [T, K] each

    def add(self, hidden: torch.Tensor, ids: torch.Tensor, squares: torch.Tensor) -> None:
        """Add a batch's, as `Observe` gives them."""
        self.hidden.append(hidden)
        self.ids.append(ids)
        self.squares.append(squares.float())


def fit_gflop(tokens: int, hidden: int, experts: int) -> float:
    """Return the operations of a layer's fit to so many tokens, in 1e9."""
    return 6 * tokens * _EPOCHS * hidden * experts / 1e9  # forward, and twice that back


def fit(
    seen: Seen, sizes: torch.Tensor, held_out: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit one layer's.

    Args:
        seen: What its tokens gave.
        sizes: Of its experts [E], in nats.
        held_out: So many of the last tokens only say when to stop.
        generator: Of random choices.

    Returns:
        Weights [H, E], bias [E], and by how much what enters the experts varies [].
    """
    hidden, ids = torch.cat(seen.hidden).float(), torch.cat(seen.ids)
    squares = torch.cat(seen.squares) / sizes.square().clamp(min=1e-30)[ids]
    center, spread = hidden.mean(0), hidden.std(0)
    spread = spread.clamp(min=float(_LEAST_SPREAD * spread.mean()) or 1.0)
    inputs, tokens = (hidden - center) / spread, len(hidden) - held_out
    weights, bias = _trained(inputs, ids, squares, tokens, len(sizes), generator)
    weights = weights / spread[:, None]
    return weights, bias - center @ weights, spread.mean()


def _trained(
    inputs: torch.Tensor,
    ids: torch.Tensor,
    squares: torch.Tensor,
    tokens: int,
    experts: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [H, E] and bias [E], fitted to so many first tokens and best on the others.

    ``inputs`` [T, H] have mean 0 and variance 1; ``squares`` [T, K] are relative to their means.
    Where nothing is better than zeros, it is zeros.
    """
    best = torch.zeros(inputs.shape[1], experts), torch.zeros(experts)
    weights, bias = (array.clone().requires_grad_() for array in best)
    others = (inputs[tokens:], ids[tokens:], squares[tokens:])
    size = min(_TOKENS_PER_STEP, tokens)
    epochs = max(_EPOCHS, _LEAST_STEPS // (tokens // size))
    optimizer = torch.optim.AdamW([weights, bias], lr=_RATE, weight_decay=_DECAY)
    steps = epochs * (tokens // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps + 1)
    least = _cost(*best, *others)
    for _ in range(epochs):
        order = torch.randperm(tokens, generator=generator)
        for start in range(0, tokens - size + 1, size):
            chosen = order[start : start + size]
            optimizer.zero_grad()
            with torch.enable_grad():
                cost = _cost(weights, bias, inputs[chosen], ids[chosen], squares[chosen])
                cost.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if (cost := _cost(weights, bias, *others)) < least:
            least, best = cost, (weights.detach().clone(), bias.detach().clone())
    return best


def _cost(
    weights: torch.Tensor,
    bias: torch.Tensor,
    inputs: torch.Tensor,
    ids: torch.Tensor,
    squares: torch.Tensor,
) -> torch.Tensor:
    logs = log_factors(weights, bias, inputs).gather(1, ids)
    return (squares * torch.exp(-2 * logs) + 2 * logs).mean()
