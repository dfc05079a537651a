"""Model without weights -> the sizes of its routed experts, which their costs go by."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alloc_moe.compiler.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class ExpertShape:
    """Size of the routed experts of one MoE layer, and how many a token activates as trained."""

    experts: int
    experts_per_token: int
    hidden: int
    intermediate: int
    biased: bool = False

    @property
    def parameters(self) -> int:
        """Weights of one expert: gate, up and down projections."""
        biases = 2 * self.intermediate + self.hidden if self.biased else 0
        return 3 * self.hidden * self.intermediate + biases


def expert_shapes(checkpoint: Checkpoint) -> tuple[ExpertShape, ...]:
    """Return the shape of each layer's experts."""
    shapes = []
    for layer in checkpoint.layers:
        module: Any = checkpoint.skeleton.get_submodule(layer.experts_name)
        _, rows, columns = module.down_proj.shape  # [experts, hidden, intermediate]
        hidden, intermediate = (columns, rows) if module.is_transposed else (rows, columns)
        shapes.append(
            ExpertShape(
                layer.num_experts,
                layer.experts_per_token,
                hidden,
                intermediate,
                bool(module.has_bias),
            )
        )
    return tuple(shapes)


def distinct_experts(experts: int, k: int, batch: int) -> Fraction:
    """Return how many of a layer's experts run for `batch` tokens of k each, in expectation.

    Under uniform routing: each token picks k of E, all equally likely and independently of the
    other tokens, so an expert is left out by all with probability (1 - k/E)^batch. Real routing is
    less even and runs fewer. One token runs exactly k.
    """
    return experts * (1 - (1 - Fraction(k, experts)) ** batch)
