"""Which values of an artifact say how many experts every layer executed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.artifact.files import ArtifactFiles
from alloc_moe.runtime.artifact.plan import (
    DROPPED,
    ROUTER_PROBS,
    ROUTER_WEIGHTS,
    AllocationPlan,
)
from alloc_moe.runtime.errors import ArtifactError


def counted_values(files: ArtifactFiles) -> tuple[str, ...]:
    """Return the name of the value that says, per MoE layer, which experts run for which row.

    Raises:
        ArtifactError: The artifact has no such value for some layer.
    """
    found = files.onnx.node_outputs
    names = []
    for layer in range(len(files.plan.layers)):
        weights, probs = (form.format(layer=layer) for form in (ROUTER_WEIGHTS, ROUTER_PROBS))
        names.append(weights if weights in found else probs)
    if missing := [name for name in names if name not in found]:
        raise ArtifactError(
            f"{files.graph} has no value {missing[0]}, so activations can't be counted. "
            "Compile the model again with this version of alloc-moe."
        )
    return tuple(names)


def most_executed(plan: AllocationPlan) -> tuple[int, ...]:
    """Return the most experts that each MoE layer executes for a row."""
    exact = plan.redistribution in ("none", "batch", "sequence")
    fixed = plan.redistribution == "none"
    return tuple(
        int(layer.k if fixed or (exact and layer.k == 1) else layer.k_original)
        for layer in plan.layers
    )


def least_executed(name: str) -> float:
    """Return what an expert's entry in one of `counted_values` is above if a lowering lets it run.

    Where the operator chooses by itself, all are.
    """
    return 0.0 if name.startswith(ROUTER_WEIGHTS.format(layer="")) else DROPPED / 2


def executed(name: str, value: NDArray[np.floating], most: int) -> NDArray[np.int64]:
    """Return the experts executed per row [rows], from one of `counted_values` [rows, experts].

    Args:
        name: That of the value.
        value: What is given to the operator. One that chooses by itself gets the logits of all
            experts, of which it takes the most.
        most: One of `most_executed`.
    """
    counts: NDArray[np.int64] = np.count_nonzero(value > least_executed(name), axis=1)
    # Where a lowering says what runs, not all experts do: there the graph is counted, not the plan.
    chooses = counts == value.shape[1]
    return np.where(chooses, counts.clip(max=most), counts)
