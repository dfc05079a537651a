"""Hidden states at a model's end -> its losses, and its divergence from another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel

_LOGITS_PER_BATCH = 2**22


def next_token_losses(
    head: Callable[[torch.Tensor], torch.Tensor],
    moe: MoeModel,
    ids: torch.Tensor,
    end: torch.Tensor,
) -> torch.Tensor:
    """Return the losses [tokens] of windows [windows, sequence] whose states at the end are `end`.

    A window's last token predicts nothing and has none.
    """
    rows = max(32, _LOGITS_PER_BATCH // moe.config.get_text_config().vocab_size)
    states, targets = end[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    parts = zip(torch.split(states, rows), torch.split(targets, rows), strict=True)
    return torch.cat([F.cross_entropy(head(part), want, reduction="none") for part, want in parts])


def divergence(
    head: Callable[[torch.Tensor], torch.Tensor],
    moe: MoeModel,
    full: torch.Tensor,
    plan: torch.Tensor,
) -> float:
    """Return KL(full || plan), summed over tokens, of hidden states [tokens, hidden] at the end."""
    rows = max(32, _LOGITS_PER_BATCH // moe.config.get_text_config().vocab_size)
    total = 0.0
    for p_states, q_states in zip(torch.split(full, rows), torch.split(plan, rows), strict=True):
        log_p, log_q = head(p_states).log_softmax(-1), head(q_states).log_softmax(-1)
        total += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    return total
