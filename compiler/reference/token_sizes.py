"""What one token's hidden state makes of experts' sizes, in PyTorch."""

from __future__ import annotations

import dataclasses

import torch

from alloc_moe.compiler.reference.policies import LayerParameters
from alloc_moe.runtime.artifact.token_sizes import LIMIT
from alloc_moe.runtime.errors import ArtifactError


def for_tokens(parameters: LayerParameters, hidden: torch.Tensor) -> LayerParameters:
    """Return what a layer is given, its sizes those of the tokens that enter it [T, H].

    Without token sizes that is what it was. The graph multiplies the weights that are scored
    instead, which is equal but for rounding.

    Raises:
        ArtifactError: The token sizes are of another hidden size.
    """
    if parameters.token_sizes is None:
        return parameters
    if parameters.token_sizes.hidden != hidden.shape[1]:
        raise ArtifactError(
            f"The plan's token sizes are for a hidden size of {parameters.token_sizes.hidden}, but "
            f"{hidden.shape[1]} enter the experts. Give the model that the plan was made for."
        )
    assert parameters.sizes is not None
    sizes = torch.as_tensor(parameters.sizes, dtype=torch.float32, device=hidden.device)
    weights, bias = (torch.from_numpy(array).to(sizes) for array in parameters.token_sizes.arrays)
    factors = log_factors(weights, bias, hidden).exp()
    return dataclasses.replace(parameters, sizes=sizes * factors)


def log_factors(weights: torch.Tensor, bias: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of `TokenSizes`' factors [T, experts] for hidden states [T, H]."""
    return (hidden.to(weights.dtype) @ weights + bias).clamp(-LIMIT, LIMIT)
