"""What one token's hidden state makes of experts' sizes, in PyTorch."""

from __future__ import annotations

import dataclasses

import torch

from alloc_moe.compiler.reference.policies import LayerParameters
from alloc_moe.runtime.artifact.token_sizes import LIMIT


def for_tokens(parameters: LayerParameters, hidden: torch.Tensor) -> LayerParameters:
    """Return what a layer is given, its sizes those of the tokens that enter it [T, H].

    Without token sizes that is what it was.
    """
    if parameters.token_sizes is None:
        return parameters
    assert parameters.sizes is not None
    sizes = torch.as_tensor(parameters.sizes, dtype=torch.float32, device=hidden.device)
    weights, bias = (torch.from_numpy(array).to(sizes) for array in parameters.token_sizes.arrays())
    factors = log_factors(weights, bias, hidden).exp()
    return dataclasses.replace(parameters, sizes=sizes * factors)


def log_factors(weights: torch.Tensor, bias: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of `TokenSizes`' factors [T, experts] for hidden states [T, H]."""
    return (hidden.to(weights.dtype) @ weights + bias).clamp(-LIMIT, LIMIT)
