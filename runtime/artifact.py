"""The artifact's contract between compiler and runtime: file names, metadata, the plan's JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alloc_moe.runtime.errors import ArtifactError

FORMAT = 1
PLAN_KEY = "alloc_moe.plan"
"""Key of the plan in the ONNX model's metadata."""
GENERATION_KEY = "alloc_moe.generation"
"""Key of ``{"eos_token_id", "context_length"}`` in the metadata, for a graph that stands alone."""
PLAN_FILE = "allocation.json"
"""Name of the plan's file in a bundle folder."""
MODEL_FILE = "model.onnx"
"""Name of the graph's file in a bundle folder."""
ROUTER_PROBS = "alloc_moe.router_probs.{layer}"
"""Name of the value [rows, experts] before a layer's MoE op: log weights, DROPPED if not run."""
DROPPED = -1e4
"""What stands in the router probabilities for an expert that is not executed."""


@dataclass(frozen=True)
class PlannedLayer:
    """What the plan gives one MoE layer.

    ``k`` is the mean number of routed experts per token, ``k_original`` the number as trained.
    """

    name: str
    experts: int
    k_original: int
    k: int


@dataclass(frozen=True)
class Budget:
    """``requested`` is what the user said, the others are activations per token over all layers."""

    requested: float | int
    activations: int
    original: int


@dataclass(frozen=True)
class AllocationPlan:
    """How many experts each layer activates per token, and how tokens share them.

    The invariant: ``sum(layer.k) == budget.activations <= budget asked for``.
    """

    source: str
    budget: Budget
    redistribution: str
    weights: str
    layers: tuple[PlannedLayer, ...]
    sensitivity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    verify: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """Return the plan as one JSON object, keys in a fixed order."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> AllocationPlan:
        """Read back what `to_json` wrote; unknown keys are ignored.

        Raises:
            ArtifactError: The text is no plan, or its format is newer than this version's.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ArtifactError(
                    f"The plan has format {data['format']}, this version reads {FORMAT}. "
                    "Update alloc-moe, or compile the model again."
                )
            return cls(
                source=data["source"],
                budget=_pick(Budget, data["budget"]),
                redistribution=data["redistribution"],
                weights=data["weights"],
                layers=tuple(_pick(PlannedLayer, layer) for layer in data["layers"]),
                sensitivity=data.get("sensitivity", {}),
                verify=data.get("verify", {}),
                versions=data.get("versions", {}),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"The allocation plan can't be read: {error!r}.") from error


def _pick(cls: type[Any], data: Mapping[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in data.items() if key in names})
