"""Muon, an optimizer for matrices that needs fewer tokens than AdamW, here for stacks of matrices.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the step size
of Liu et al., "Muon is Scalable for LLM Training" (2025), which lets it share the learning rate of
AdamW. torch.optim.Muon takes single matrices only, but the experts of a layer are one 3-D tensor.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Step along the orthogonalized momentum of each matrix.

    Args:
        matrices: Parameters [..., rows, columns]; leading dimensions count as separate matrices.
        stacked: Parameters in which two matrices lie on top of each other, like gate_up_proj.
        pool: Updates several parameters at once.
        lr: Learning rate, as for AdamW.
        weight_decay: Decoupled weight decay.
        momentum: Decay of the running mean of gradients.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        stacked: Iterable[nn.Parameter],
        *,
        pool: Executor,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        groups = [{"params": list(matrices), "stack": 1}, {"params": list(stacked), "stack": 2}]
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(groups, defaults)
        self._pool = pool

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "Muon evaluates no closure."
        jobs = [(p, group) for group in self.param_groups for p in group["params"]]
        list(self._pool.map(lambda job: self._update(*job), jobs))

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        if parameter.grad is None:
            return
        state = self.state[parameter]
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        mean = state["mean"].lerp_(parameter.grad, 1 - group["momentum"])
        ahead = parameter.grad.lerp(mean, group["momentum"])  # Nesterov
        rows, columns = parameter.shape[-2] // group["stack"], parameter.shape[-1]
        update = orthogonalize(ahead.view(-1, rows, columns)).reshape(parameter.shape)
        # Updates of AdamW have a root mean square of about 0.2; these are given the same.
        scale = 0.2 * max(rows, columns) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Return matrices [count, rows, columns] with all singular values pushed to 0.7 to 1.2.

    Newton-Schulz iterations with the coefficients of the reference implementation.
    """
    transposed = matrices.shape[-2] > matrices.shape[-1]
    result = matrices.mT if transposed else matrices
    result = result / (result.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        square = result @ result.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        result = torch.baddbmm(result, polynomial, result, beta=3.4445)
    return result.mT if transposed else result
