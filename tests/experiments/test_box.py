"""Quadratic programs over the box, and the worst mixture of several sides."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from fisher import box_program
from hypothesis import example, given, settings, strategies as st

from counterpoise.search.worst import worst


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 8))
@example(17723, 6, 6)
def test_the_box_program_meets_its_conditions(seed: int, k: int, rank: int) -> None:
    draw = np.random.default_rng(seed)
    factor, c = draw.normal(size=(rank, k)), draw.normal(size=k)
    q = factor.T @ factor + 0.05 * np.eye(k)
    r = box_program(q, c)
    slope = q @ r + c
    for value, s in zip(r, slope, strict=True):
        assert 0 <= value <= 1
        assert s >= -1e-6 if value < 1e-9 else s <= 1e-6 if value > 1 - 1e-9 else abs(s) < 1e-6


def test_a_singular_program_is_no_worse_than_a_grid() -> None:
    q, c = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), np.array([-0.7, -0.7, 0.3])

    def value(r: np.ndarray) -> float:
        return float(r @ q @ r / 2 + c @ r)

    least = min(value(np.array(r)) for r in itertools.product(np.linspace(0, 1, 41), repeat=3))
    assert value(box_program(q, c)) <= least + 1e-8
    with pytest.raises(ValueError, match="positive semidefinite"):
        box_program(-np.eye(2), np.ones(2))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.6))
def test_the_worst_mixture_has_danskins_gradient(seed: int, rho: float) -> None:
    draw = np.random.default_rng(seed)
    centres, bends = draw.uniform(size=(3, 4)), draw.uniform(0.5, 2, size=(3, 4))

    def sides(r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (bends * (r - centres) ** 2).sum(1), 2 * bends * (r - centres)

    r, h = draw.uniform(size=4), 1e-6
    found = worst(*sides(r), rho)
    numeric = [(worst(*sides(r + h * e), rho).value - worst(*sides(r - h * e), rho).value) / (2 * h) for e in np.eye(4)]
    np.testing.assert_allclose(found.gradient, numeric, atol=2e-6)
    assert sides(r)[0].mean() - 1e-12 <= found.value <= sides(r)[0].max() + 1e-12
    assert found.weights.sum() == pytest.approx(1.0)


def test_the_radius_goes_from_the_mean_to_the_largest() -> None:
    values, gradients = np.array([0.2, 0.9, 0.4]), np.eye(3)
    even, most = worst(values, gradients, 0.0), worst(values, gradients, np.log(3))
    assert even.value == pytest.approx(0.5)
    assert most.value == pytest.approx(0.9)
    assert most.gradient.tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="rho: expected a number >= 0"):
        worst(values, gradients, -1.0)
