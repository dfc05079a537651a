"""Shapes of models that benchmarks make up with random weights, the same for all contenders."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """An OLMoE's sizes; every token of every layer has ``experts_per_token`` of ``experts``."""

    layers: int
    hidden: int
    heads: int
    experts: int
    experts_per_token: int
    expert_size: int
    vocabulary: int
    context: int = 8192
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


SHAPES = {
    "olmoe-1b-7b": Shape(16, 2048, 16, 64, 8, 1024, 50304),
    "tiny": Shape(4, 64, 2, 8, 4, 32, 320, context=1024),
}
