"""Made-up results of a sweep, plausible and the same for the same arguments."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from alloc_moe.compiler.sweep.records import (
    CalibrationText,
    Cell,
    ScoredText,
    Sensitivity,
    SweepResults,
)


class Method(NamedTuple):
    """A label and its parts; ``loss`` scales the added loss, ``width`` the spread of experts."""

    label: str
    parts: tuple[str, str, str]
    loss: float
    width: float
    overshoot: float = 1.0
    decode: float = 1.0


METHODS = (
    Method("uniform k", ("uniform", "none", "none"), 0.0300, 0.0),
    Method("Alloc-L (kl)", ("kl", "none", "none"), 0.0271, 0.0),
    Method("data-free", ("data-free", "none", "none"), 0.0405, 0.0),
    Method("top-p", ("uniform", "top-p", "none"), 0.0248, 1.6, 0.985),
    Method("ratio", ("uniform", "ratio", "none"), 0.0236, 1.4, 1.034),
    Method("Alloc-T batch", ("uniform", "batch", "none"), 0.0193, 1.5, 1.0, 1.55),
    Method("threshold", ("uniform", "threshold", "none"), 0.0199, 1.5, 0.981),
    Method("price", ("price", "price", "none"), 0.0158, 1.9, 0.993),
    Method("price + affine (default)", ("price", "price", "affine"), 0.0123, 1.9, 0.995),
)
SHA = "c7e1d951238b4f0a9d3c5e7712fa08b6c7e1d951238b4f0a9d3c5e7712fa08b6"


def synthetic_sweep(
    *,
    methods: tuple[Method, ...] = METHODS,
    budgets: tuple[float, ...] = (0.25, 0.375, 0.5, 0.625, 0.75),
    seeds: tuple[int, ...] = (0, 1, 2),
    layers: int = 6,
    k: int = 8,
    offset: float = 0.0,
    sensitivities: tuple[str, ...] = ("kl", "ppl-suffix"),
    decode: bool = True,
) -> SweepResults:
    """Return a sweep's results; ``offset`` is added to every added loss, to make gains."""
    rng = random.Random(f"{len(methods)} {budgets} {seeds} {layers} {k}")
    weights = [1.6 - 0.9 * math.sin(math.pi * (i + 0.5) / layers) for i in range(layers)]
    cells = [
        _cell(rng, method, budget, seed=seed, weights=weights, k=k, offset=offset, decode=decode)
        for method in methods
        for budget in budgets
        for seed in seeds
    ]
    return SweepResults(
        "examples/tiny-moe",
        "olmoe",
        layers=tuple(f"model.layers.{i}.mlp" for i in range(layers)),
        experts=(max(4 * k, 8),) * layers,
        experts_per_token=(k,) * layers,
        full_loss=3.21875,
        text=ScoredText("held-out.txt", SHA, 16384),
        calibration=CalibrationText("calibration.txt", SHA[::-1], 8192, seeds),
        machine={"processor": "Example CPU @ 2.50 GHz", "cores": "2", "memory": "8 GB"},
        versions={"alloc-moe": "0.2.0", "torch": "2.13.0+cpu", "onnxruntime": "1.31.1"},
        date="2026-11-23",
        command="alloc-sweep examples/tiny-moe --budgets 0.25,0.375,0.5,0.625,0.75 -o sweep/",
        sensitivities=tuple(
            Sensitivity(name, "none", _costs(rng, name, weights, k), 37.25)
            for name in sensitivities
        ),
        cells=tuple(cells),
    )


def _cell(
    rng: random.Random,
    method: Method,
    budget: float,
    *,
    seed: int,
    weights: list[float],
    k: int,
    offset: float,
    decode: bool,
) -> Cell:
    scale = method.loss * ((1 - budget) / 0.5) * (0.5 / budget) ** 1.3
    added = scale * rng.gauss(1.0, 0.025) + offset
    mean_weight = sum(weights) / len(weights)
    uneven = method.parts[0] != "uniform"
    planned = [min(max(k * budget * (w / mean_weight if uneven else 1), 1), k) for w in weights]
    histogram = [_histogram(p, method.width, k, rng) for p in planned]
    ran = [sum(n * f for n, f in enumerate(row)) * method.overshoot for row in histogram]
    alone = 3.21875 + added * method.decode * 1.01
    return Cell(
        method.label,
        budget,
        seed=seed,
        allocation=method.parts[0],
        redistribution=method.parts[1],
        correction=method.parts[2],
        loss=3.21875 + added,
        added_loss=added,
        activations=sum(ran),
        activations_per_layer=tuple(ran),
        planned_per_layer=tuple(planned),
        experts_per_token_histogram=tuple(tuple(row) for row in histogram),
        loss_decode=alone if decode else None,
        default=method.label.endswith("(default)"),
    )


def _histogram(mean: float, width: float, k: int, rng: random.Random) -> list[float]:
    if not width:
        low = int(mean)
        part = mean - low
        return [(1 - part) if n == low else part if n == low + 1 else 0.0 for n in range(k + 1)]
    target = min(max(mean + rng.gauss(0, 0.01), 1.02), k - 0.02)
    low, high = -40.0, k + 40.0
    for _ in range(60):  # the centre whose histogram has this mean
        centre = (low + high) / 2
        row = _bell(centre, width, k)
        if sum(n * share for n, share in enumerate(row)) < target:
            low = centre
        else:
            high = centre
    return row


def _bell(centre: float, width: float, k: int) -> list[float]:
    exponents = [-(((n - centre) / width) ** 2) / 2 for n in range(1, k + 1)]
    sizes = [math.exp(exponent - max(exponents)) for exponent in exponents]
    return [0.0, *(size / sum(sizes) for size in sizes)]


def _costs(
    rng: random.Random, metric: str, weights: list[float], k: int
) -> tuple[tuple[float, ...], ...]:
    base, size = (0.0, 0.04) if metric == "kl" else (24.6, 3.0)
    return tuple(
        tuple(
            base
            + size
            * w
            * (0.0 if n == k else math.exp(-0.75 * (n - 1) * 8 / k))
            * rng.uniform(0.85, 1.15)
            for n in range(1, k + 1)
        )
        for w in weights
    )
