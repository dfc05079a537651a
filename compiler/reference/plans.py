"""The plan an original model runs under: one from a file, or as it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alloc_moe.runtime.artifact.files import find_artifact
from alloc_moe.runtime.artifact.plan import AllocationPlan, Budget, PlannedLayer
from alloc_moe.runtime.artifact.shapes import ShapeError, read_file
from alloc_moe.runtime.errors import ArtifactError

if TYPE_CHECKING:
    from alloc_moe.compiler.model.checkpoint import Checkpoint


def read_plan(path: Path, checkpoint: Checkpoint) -> AllocationPlan:
    """Return the plan in an allocation.json or an artifact.

    Raises:
        ArtifactError: It can't be read, was made of another model than the checkpoint, or
            needs weights that only its artifact has.
    """
    if path.suffix == ".json":
        try:
            text = read_file(path)
        except (OSError, ShapeError) as error:
            raise ArtifactError(f"The plan {path} can't be read: {error}.") from error
        plan = AllocationPlan.from_json(text)
    else:
        plan = find_artifact(path).plan
    if plan.correction:
        raise ArtifactError(
            f"The plan in {path} has a correction, which is in the weights of its artifact, "
            "so it can't be run from the plan alone. Evaluate the artifact."
        )
    planned = [(layer.name, layer.k_original) for layer in plan.layers]
    found = [(layer.name, layer.experts_per_token) for layer in checkpoint.layers]
    if planned != found:
        raise ArtifactError(
            f"The plan in {path} is for {len(planned)} MoE layers ({planned[:1]}...), "
            f"{checkpoint.source} has {len(found)} ({found[:1]}...). "
            "Give a plan made of this model."
        )
    return plan


def trained_plan(checkpoint: Checkpoint) -> AllocationPlan:
    """Return the plan that runs every expert the model was trained to run."""
    planned = tuple(
        PlannedLayer(
            layer.name, layer.num_experts, layer.experts_per_token, layer.experts_per_token
        )
        for layer in checkpoint.layers
    )
    total = sum(layer.experts_per_token for layer in checkpoint.layers)
    return AllocationPlan(checkpoint.source, Budget(1.0, total, total), "none", "keep", planned)
