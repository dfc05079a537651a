"""Loaded models of the random checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from numpy.typing import NDArray

    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Compiled, Metric, Redistribution, SensitivityProfile
    from alloc_moe.runtime.artifact.plan import AllocationPlan


@pytest.fixture(scope="session", autouse=True)
def fast(captured_once: None) -> None:
    """Capture no model again that another test had captured."""


@pytest.fixture(scope="session")
def moe_model(checkpoint: Callable[[str], Path]) -> Callable[[str], MoeModel]:
    """Return a function from a family's name to its loaded checkpoint."""
    from alloc_moe.compiler.model.loading import load_model

    loaded: dict[str, MoeModel] = {}

    def load(family: str) -> MoeModel:
        if family not in loaded:
            loaded[family] = load_model(str(checkpoint(family)))
        return loaded[family]

    return load


@pytest.fixture(scope="session")
def exported(moe_model: Callable[[str], MoeModel]) -> Callable[[str], ir.Model]:
    """Return a function from a family's name to its normalised graph, exported once."""
    from alloc_moe.compiler.export.normalize import export_model

    return functools.cache(lambda family: export_model(moe_model(family), dtype="float32"))


@pytest.fixture
def model(
    checkpoint: Callable[[str], Path],
    exported: Callable[[str], ir.Model],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """Return a checkpoint whose export was done before."""
    monkeypatch.setattr(
        "alloc_moe.compiler.artifact.export_model", lambda *_, **__: exported("olmoe")
    )
    return str(checkpoint("olmoe"))


@pytest.fixture
def compile_to(model: str) -> Callable[..., Compiled]:
    """Return a function from an output and options to what a compile of the model made."""
    from alloc_moe.compiler import compile

    def run(output: Path | str, **options: Any) -> Compiled:
        return compile(**{"model": model, "output": output, "tokens": 256, **options})

    return run


@pytest.fixture(scope="session")
def half_graph(moe_model: Callable[[str], MoeModel]) -> ir.Model:
    """Return a normalised graph in float16."""
    from alloc_moe.compiler.export.normalize import export_model

    return export_model(moe_model("olmoe"), dtype="float16")


@pytest.fixture(scope="session")
def plan_for() -> Callable[..., AllocationPlan]:
    """Return a function from a model and the k of each layer to a plan."""
    from alloc_moe.runtime.artifact.plan import AllocationPlan, Budget, PlannedLayer

    def make(
        moe: MoeModel,
        ks: Sequence[int],
        *,
        redistribution: str = "batch",
        weights: str = "keep",
    ) -> AllocationPlan:
        layers = tuple(
            PlannedLayer(layer.name, layer.num_experts, layer.experts_per_token, k)
            for layer, k in zip(moe.layers, ks, strict=True)
        )
        original = sum(layer.k_original for layer in layers)
        budget = Budget(sum(ks), sum(ks), original)
        return AllocationPlan(moe.checkpoint.source, budget, redistribution, weights, layers)

    return make


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a graph specialised for a plan, and returns its path."""
    from alloc_moe.compiler.export.specialize import specialize
    from alloc_moe.compiler.package import output as package

    def write(
        graph: ir.Model,
        plan: AllocationPlan,
        folder: Path = tmp_path,
        *,
        device: str = "cpu",
        **options: Any,
    ) -> Path:
        path = folder / "out.onnx"
        package.save_graph(specialize(graph, plan, device=device, **options), path)
        return path

    return write


@pytest.fixture(scope="session")
def token_ids() -> NDArray[np.int64]:
    """Return text of random bytes [windows, tokens]."""
    return np.random.default_rng(3).integers(0, 256, (8, 64))


@pytest.fixture(scope="session")
def calibration(token_ids: NDArray[np.int64]) -> CalibrationSet:
    """Return windows of random bytes to calibrate on."""
    from alloc_moe.compiler.calibration.windows import CalibrationSet

    windows, length = token_ids.shape
    return CalibrationSet(token_ids, "0" * 64, 0, windows * length, length, "random bytes")


@pytest.fixture(scope="session")
def own_text(moe_model: Callable[[str], MoeModel]) -> torch.Tensor:
    """Return windows that the small OLMoE wrote: on these it is hard to be better than it is."""
    import torch

    moe = moe_model("olmoe")
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(256, (8, 1), generator=random)
    with torch.no_grad():
        for _ in range(63):
            likely = moe.model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(likely, 1, generator=random)], dim=1)
    return ids


@pytest.fixture(scope="session")
def profile_of(
    moe_model: Callable[[str], MoeModel], calibration: CalibrationSet
) -> Callable[[str, Metric], SensitivityProfile]:
    """Return a function from a family's name and a metric to what fewer experts cost it."""
    from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity

    return functools.cache(
        lambda family, metric: measure_sensitivity(moe_model(family), calibration, metric=metric)
    )


@pytest.fixture(scope="session")
def score_plan(token_ids: NDArray[np.int64]) -> Callable[..., AllocationPlan]:
    """Return a function from a model and a score policy to a plan that keeps about every other."""
    import torch

    from alloc_moe.compiler.reference.experts import library_experts, replaced_experts
    from alloc_moe.compiler.reference.policies import rank_candidates
    from alloc_moe.compiler.reference.scores import scores
    from alloc_moe.runtime.artifact.plan import AllocationPlan, Budget, DialPoint, PlannedLayer

    def make(
        moe: MoeModel, redistribution: Redistribution, *, weights: str = "keep", **more: Any
    ) -> AllocationPlan:
        experts = moe.layers[0].num_experts
        sizes = tuple(torch.linspace(0.5, 2, experts).tolist())
        found: list[torch.Tensor] = []

        def record(*call: Any) -> torch.Tensor:
            ranked = rank_candidates(call[3], call[2])
            found.append(scores(redistribution, *ranked, sizes, more.get("overlap", 0.0))[:, 1:])
            return library_experts(*call)

        with (
            torch.inference_mode(),
            replaced_experts(moe.model, {layer.experts_name: record for layer in moe.layers}),
        ):
            moe.model(input_ids=torch.from_numpy(token_ids[:1]))
        price = float(torch.cat(found).median()) if redistribution == "price" else None
        layers = tuple(
            PlannedLayer(
                layer.name,
                layer.num_experts,
                layer.experts_per_token,
                1 + float((score >= (price or score.median())).float().sum(1).mean()),
                threshold=None if price else float(score.median()),
                sizes=sizes if price else None,
            )
            for layer, score in zip(moe.layers, found, strict=True)
        )
        activations = sum(layer.k for layer in layers)
        original = sum(layer.k_original for layer in layers)
        if price and "cap" not in more:
            points = DialPoint(activations, price), DialPoint(activations - 1, 2 * price)
            more["dial"] = points
        budget = Budget(0.6, activations, original)
        return AllocationPlan(
            moe.checkpoint.source, budget, redistribution, weights, layers, price=price, **more
        )

    return make
