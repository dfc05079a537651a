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
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.errors import TokenSizesError
from alloc_moe.compiler.reference.token_sizes import log_factors
from alloc_moe.compiler.sensitivity.corrected import Reduced
from alloc_moe.compiler.sensitivity.fisher import FisherRun
from alloc_moe.compiler.sensitivity.kept import make_keep
from alloc_moe.compiler.sensitivity.sums import LayerSums
from alloc_moe.compiler.workspace.processes import Processes
from alloc_moe.runtime.artifact.token_sizes import TokenSizes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.runtime.console import Console

_FURTHER = 4  # in calibration tokens: more numbers are fitted than sizes are
_MOST_TOKENS = 1 << 16  # that are fitted to, and a quarter as many held out
_LEAST_TOKENS = 128
_TOKENS_PER_BATCH = 4096
_EPOCHS = 12  # or more, on little text
_LEAST_STEPS = 300
_TOKENS_PER_STEP = 1024
_RATE = 3e-3
_DECAY = 1e-2
_HELD_OUT = 8  # without further text, one of so many tokens tells when to stop
_LEAST_SPREAD = 1e-2  # of a dimension, in the mean of all: what hardly varies tells nothing
METHOD = (
    *(_FURTHER, _MOST_TOKENS, _TOKENS_PER_BATCH, _EPOCHS, _LEAST_STEPS, _TOKENS_PER_STEP),
    *(_RATE, _DECAY, _HELD_OUT, _LEAST_SPREAD),
)
"""What a fit depends on besides model, text and sizes."""


def fit_token_sizes(
    moe: MoeModel,
    calibration: CalibrationSet,
    sizes: Sequence[Sequence[float]],
    console: Console,
) -> tuple[TokenSizes, ...]:
    """Return what tokens multiply the sizes of each MoE layer's experts by.

    Args:
        moe: The model, in memory.
        calibration: The text, of which further windows are taken too; its seed is that of all
            random choices.
        sizes: Of each layer's experts [experts], in nats.
        console: Where progress is told.

    Raises:
        TokenSizesError: There is too little text, or some are beyond float16.
    """
    ids, held_out = _text(calibration)
    batches = torch.split(ids, max(1, _TOKENS_PER_BATCH // calibration.sequence_length))
    seen = [_Seen() for _ in moe.layers]

    def observe(layer: int, *given: torch.Tensor) -> None:
        seen[layer].add(*given)

    reduced = Reduced(make_keep(moe, batches, "none", Processes()))
    run = FisherRun(moe, reduced, seed=calibration.seed, observe=observe)
    found, first = [], 0
    steps = len(batches) + len(moe.layers)
    with (
        torch.inference_mode(mode=False),
        torch.no_grad(),
        console.progress("Fitting token sizes", steps, unit="steps") as progress,
    ):
        for batch in batches:
            run.add(batch, first, [LayerSums.of(layer) for layer in moe.layers])
            first += len(batch)
            progress.advance()
        for layer, given in zip(seen, sizes, strict=True):
            generator = torch.Generator().manual_seed(calibration.seed)
            found.append(_fit(layer, torch.tensor(given), held_out, generator))
            progress.advance()
    return tuple(found)


def _text(calibration: CalibrationSet) -> tuple[torch.Tensor, int]:
    """Return windows to see, and how many tokens at their end are held out."""
    # What every layer sees is kept until all are fitted, so memory bounds the text.
    most = max(1, _MOST_TOKENS // calibration.sequence_length)
    ids = torch.from_numpy(calibration.ids[:most])
    if calibration.further is not None:
        further = torch.from_numpy(calibration.further[: _FURTHER * len(calibration.ids)])
        ids = ids[: max(1, most // _FURTHER)]
        return torch.cat([further[:most], ids]), ids.numel()
    if ids.numel() < _LEAST_TOKENS:
        raise TokenSizesError(
            f"are fitted to {_LEAST_TOKENS} tokens of calibration text at least, and there are "
            f"{ids.numel()}"
        )
    return ids, ids.numel() // _HELD_OUT


@dataclass
class _Seen:
    """What one layer's tokens gave, batch by batch."""

    hidden: list[torch.Tensor] = field(default_factory=list)  # [T, H] each
    ids: list[torch.Tensor] = field(default_factory=list)  # [T, K] each
    squares: list[torch.Tensor] = field(default_factory=list)  # [T, K] each

    def add(self, hidden: torch.Tensor, ids: torch.Tensor, squares: torch.Tensor) -> None:
        self.hidden.append(hidden)
        self.ids.append(ids)
        self.squares.append(squares.float())


def _fit(seen: _Seen, sizes: torch.Tensor, held_out: int, generator: torch.Generator) -> TokenSizes:
    hidden, ids = torch.cat(seen.hidden).float(), torch.cat(seen.ids)
    squares = torch.cat(seen.squares) / sizes.square().clamp(min=1e-30)[ids]
    center, spread = hidden.mean(0), hidden.std(0)
    spread = spread.clamp(min=float(_LEAST_SPREAD * spread.mean()) or 1.0)
    inputs, tokens = (hidden - center) / spread, len(hidden) - held_out
    weights, bias = _trained(inputs, ids, squares, tokens, len(sizes), generator)
    weights = weights / spread[:, None]
    try:
        return TokenSizes.of(weights.numpy(), (bias - center @ weights).numpy())
    except ValueError as error:
        raise TokenSizesError(
            "are stored in float16, which doesn't hold those of this model: what enters its "
            f"experts varies by {float(spread.mean()):.2g} only"
        ) from error


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
