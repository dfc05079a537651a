"""One cell of a sweep as work to do: what it depends on, how it is measured, what comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alloc_moe.compiler.export.specialize import specialize

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Planned
    from alloc_moe.compiler.sweep.kept import Found
    from alloc_moe.compiler.sweep.models import StoredModel
    from alloc_moe.compiler.sweep.records import Cell
    from alloc_moe.compiler.sweep.running import HeldOutRuns


@dataclass(frozen=True)
class Job:
    """A cell to measure.

    ``key`` has all that it depends on; ``measure`` gives None where there is no such plan;
    ``cell`` makes of it, and of the full model's loss, what is reported.
    """

    key: str
    name: str
    measure: Callable[[], Found | None]
    cell: Callable[[Found, float], Cell]


def measured(
    model: StoredModel, runs: HeldOutRuns, moe: MoeModel, planned: Planned, *, since: float
) -> Found:
    """Return what the artifact of a plan gives on the held-out text, and what a token reads.

    Args:
        model: What the plan was made of; experts whose bits it chose are floats again after this.
        runs: Run the artifact.
        moe: The model with the bits that the plan chose.
        planned: The plan, and its corrections.
        since: When planning began, by `time.monotonic`.
    """
    layers = planned.plan.layers
    graph = specialize(
        model.graph(moe),
        planned.plan,
        device="cpu",
        corrections=planned.corrections,
        quantization=moe.quantization,
    )
    found = runs.run(graph)
    planned_bytes, read_bytes = (
        model.bytes_read(moe, planned, experts)
        for experts in (tuple(layer.k for layer in layers), tuple(found["per_layer"]))
    )
    stored = moe.quantization
    bits = [form.bits for form in stored.experts] if stored else [32] * len(layers)
    model.take_back(moe)
    return {
        **found,
        "planned": [layer.k for layer in layers],
        "planned_bytes": planned_bytes,
        "read_bytes": read_bytes,
        "bits": bits,
        "seconds": time.monotonic() - since,
    }


def measures(found: Found, full: float) -> dict[str, Any]:
    """Return the fields of a cell that were measured."""
    return {
        "loss": found["loss"],
        "added_loss": found["loss"] - full,
        "activations": sum(found["per_layer"]),
        "activations_per_layer": tuple(found["per_layer"]),
        "planned_per_layer": tuple(found["planned"]),
        "experts_per_token_histogram": tuple(tuple(row) for row in found["histogram"]),
        "divergence": found.get("divergence"),
        "planned_bytes": found.get("planned_bytes"),
        "read_bytes": found.get("read_bytes"),
        "bits_per_layer": tuple(found.get("bits", ())),
        "seconds": found.get("seconds"),
    }
