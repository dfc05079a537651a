"""Corrections by sums over tokens, against least squares done directly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alloc_moe.compiler.correction.sums import _RIDGE_BIAS, _RIDGE_SCALE, CorrectionSums
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.reference.experts import (
    dense_weights,
)

Models = Callable[[str], MoeModel]

EXPERTS, CANDIDATES, HIDDEN = 6, 3, 5


class Tokens:
    """Random outputs, routings and what the outputs lack, of `count` tokens."""

    def __init__(self, seed: int, count: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.outputs = torch.randn(count, HIDDEN, generator=random)
        self.ids = torch.stack(
            [torch.randperm(EXPERTS, generator=random)[:CANDIDATES] for _ in range(count)]
        )
        weights = torch.rand(count, CANDIDATES, generator=random)
        self.weights = weights * (torch.rand(count, CANDIDATES, generator=random) < 0.6)
        self.missing = 0.3 * self.outputs + 0.5 * torch.randn(count, HIDDEN, generator=random)
        self.importance = 0.1 + torch.rand(count, generator=random)

    def sums(self, *, experts: int = EXPERTS, parts: int = 1, weighted: bool) -> CorrectionSums:
        sums = CorrectionSums(experts)
        for part in torch.arange(len(self.ids)).tensor_split(parts):
            sums.add(
                self.outputs[part],
                self.ids[part],
                self.weights[part],
                self.missing[part],
                self.importance[part] if weighted else None,
            )
        return sums

    def roots(self, *, weighted: bool) -> torch.Tensor:
        one = torch.ones(len(self.ids))
        return (self.importance if weighted else one).double().sqrt()[:, None]


def direct_affine(tokens: Tokens, *, weighted: bool) -> tuple[np.ndarray, np.ndarray]:
    """Solve for scale and bias dimension by dimension, the ridge as rows of their own."""
    root = tokens.roots(weighted=weighted)
    outputs, missing = tokens.outputs.double() * root, tokens.missing.double() * root
    weights = dense_weights(tokens.ids, tokens.weights, EXPERTS).double() * root
    share = _RIDGE_BIAS * EXPERTS / len(tokens.ids)
    of_bias = share * weights.square().sum(0).mean()
    scales, biases = [], []
    for dimension in range(HIDDEN):
        y, m = outputs[:, dimension], missing[:, dimension]
        rows = torch.cat([y[:, None], weights], dim=1)
        ridge = torch.full((1 + EXPERTS,), float(of_bias), dtype=torch.float64)
        ridge[0] = _RIDGE_SCALE * y.square().sum()
        matrix = torch.cat([rows, ridge.sqrt().diag()])
        target = torch.cat([m, torch.zeros(1 + EXPERTS, dtype=torch.float64)])
        found = torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0]
        scales.append(1 + found[0])
        biases.append(found[1:])
    return torch.stack(scales).numpy(), torch.stack(biases, dim=1).numpy()


@pytest.mark.parametrize("weighted", [False, True])
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 4))
def test_an_affine_correction_is_the_least_squares_solution(
    weighted: bool, seed: int, count: int, parts: int
) -> None:
    tokens = Tokens(seed, count)
    found = tokens.sums(parts=parts, weighted=weighted).affine()
    scale, bias = direct_affine(tokens, weighted=weighted)
    assert found.bias is not None
    np.testing.assert_allclose(found.scale, scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.bias, bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@given(st.integers(0, 10**6), st.integers(1, 60))
def test_a_gain_is_the_least_squares_solution(weighted: bool, seed: int, count: int) -> None:
    tokens = Tokens(seed, count)
    found = tokens.sums(experts=0, parts=2, weighted=weighted).gain()
    root = tokens.roots(weighted=weighted)
    y, m = ((t.double() * root).flatten() for t in (tokens.outputs, tokens.missing))
    solution = torch.linalg.lstsq(y[:, None], (y + m)[:, None]).solution.item()
    assert found.bias is None
    np.testing.assert_allclose(found.scale, np.full(HIDDEN, solution), rtol=1e-5)


def test_nothing_missing_is_left_alone() -> None:
    tokens = Tokens(0, 40)
    tokens.missing = torch.zeros_like(tokens.missing)
    sums = tokens.sums(weighted=True)
    np.testing.assert_array_equal(sums.gain().scale, 1)
    affine = sums.affine()
    np.testing.assert_allclose(affine.scale, 1, atol=1e-7)
    assert affine.bias is not None
    np.testing.assert_allclose(affine.bias, 0, atol=1e-7)


def test_experts_that_never_ran_and_dimensions_that_are_dead_are_left_alone() -> None:
    tokens = Tokens(0, 40)
    tokens.weights[tokens.ids == 2] = 0
    tokens.outputs[:, 1] = 0
    affine = tokens.sums(weighted=False).affine()
    assert affine.bias is not None
    np.testing.assert_array_equal(affine.bias[2], 0)
    assert np.isfinite(affine.scale).all()
    assert affine.scale[1] == 1
    nothing = CorrectionSums(EXPERTS)
    zero = torch.zeros(4, HIDDEN)
    nothing.add(zero, tokens.ids[:4], torch.zeros(4, CANDIDATES), zero)
    np.testing.assert_array_equal(nothing.affine().scale, 1)
    np.testing.assert_array_equal(nothing.gain().scale, 1)


def test_little_text_is_trusted_little() -> None:
    few, many = Tokens(1, 12), Tokens(1, 3000)
    sizes = []
    for tokens in (few, many):
        # The same shift of every expert is all there is to find.
        dense = dense_weights(tokens.ids, tokens.weights, EXPERTS)
        tokens.missing = dense @ torch.ones(EXPERTS, HIDDEN)
        bias = tokens.sums(weighted=False).affine().bias
        assert bias is not None
        sizes.append(float(bias.mean()))
    assert sizes[0] < 0.7 < 0.95 < sizes[1] <= 1.001
