"""The path's mathematics: against brute force, exact where it should be, monotone where it must be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from counterpoise.search.separable import Separable

POINTS = np.linspace(0, 1, 5)
GRID = np.linspace(0, 1, 4001)
SLOPES = arrays(float, (5, 3), elements=st.floats(-3, 3))


def heights(model: Separable) -> np.ndarray:
    """G_k on the grid, shape (4001, K)."""
    return model.slopes.antiderivative()(GRID)


def separable_path(alignment: Separable, retention: Separable, weights: Sequence[float]) -> np.ndarray:
    """The minimum for every lambda, shape (lambdas, K)."""
    return np.stack([alignment.plus(retention, float(x)).argmin() for x in weights])


@settings(max_examples=150, deadline=None)
@given(SLOPES, SLOPES, st.floats(0, 20))
def test_the_minimum_is_that_of_a_brute_force_grid(a: np.ndarray, b: np.ndarray, weight: float) -> None:
    both = Separable.from_slopes(POINTS, a, 0.0).plus(Separable.from_slopes(POINTS, b, 0.0), weight)
    ratios = both.argmin()
    assert ((ratios >= 0) & (ratios <= 1)).all()
    reached = both.value(ratios)
    least = heights(both).min(0).sum()
    assert reached <= least + 1e-9
    # Between grid points a curve of bounded second derivative cannot dip further than this.
    assert reached >= least - 3 * np.abs(both.slopes.derivative()(GRID)).max() * (GRID[1] / 2) ** 2 - 1e-9


@settings(max_examples=100, deadline=None)
@given(SLOPES, SLOPES)
def test_with_lambda_retention_never_rises_and_alignment_never_falls(a: np.ndarray, b: np.ndarray) -> None:
    alignment, retention = (Separable.from_slopes(POINTS, s, 0.0) for s in (a, b))
    rows = separable_path(alignment, retention, [0.0, 0.1, 0.5, 1.0, 3.0, 30.0])
    kept, held = ([m.value(r) for r in rows] for m in (retention, alignment))
    assert (np.diff(kept) <= 1e-9).all()
    assert (np.diff(held) >= -1e-9).all()


@settings(max_examples=50, deadline=None)
@given(arrays(float, (4, 3), elements=st.floats(-2, 2)), arrays(float, 3, elements=st.floats(0, 1)))
def test_cubic_slopes_are_integrated_exactly(coefficients: np.ndarray, ratios: np.ndarray) -> None:
    def slope(t: np.ndarray) -> np.ndarray:
        return sum(c * t[..., None] ** i for i, c in enumerate(coefficients))

    model = Separable.from_slopes(POINTS, slope(POINTS), 0.7)
    wanted = 0.7 + sum((c * ratios ** (i + 1) / (i + 1)).sum() for i, c in enumerate(coefficients))
    assert model.value(ratios) == pytest.approx(wanted, abs=1e-12)
    np.testing.assert_allclose(model.gradient(ratios), [slope(r)[k] for k, r in enumerate(ratios)], atol=1e-12)
    assert model.scaled(0.2, 4.0).value(ratios) == pytest.approx((wanted - 0.2) / 4, abs=1e-12)


def test_quadratic_sides_have_the_path_in_closed_form() -> None:
    """F_A = sum a (1 - r)^2, F_R = sum b r^2: r = a / (a + lambda b)."""
    a, b = np.array([3.0, 1.0, 0.2]), np.array([0.5, 1.0, 4.0])
    alignment = Separable.from_slopes(POINTS, 2 * a * (POINTS[:, None] - 1), a.sum())
    retention = Separable.from_slopes(POINTS, 2 * b * POINTS[:, None], 0.0)
    lambdas = np.array([0.25, 1.0, 4.0])
    np.testing.assert_allclose(
        separable_path(alignment, retention, lambdas), a / (a + lambdas[:, None] * b), atol=1e-12
    )


def test_a_ratio_jumps_where_the_slope_is_not_monotone() -> None:
    """A loss that is concave in between has no minimum inside: r is 1 up to lambda 1 and 0 after it."""
    alignment = Separable.from_slopes(POINTS, -np.ones((5, 1)), 1.0)
    retention = Separable.from_slopes(POINTS, 2 * (1 - POINTS[:, None]), 0.0)
    assert separable_path(alignment, retention, [0.99, 1.01]).ravel().tolist() == [1.0, 0.0]


def test_what_costs_nothing_is_kept() -> None:
    flat = Separable.from_slopes(POINTS, np.zeros((5, 2)), 0.0)
    assert separable_path(flat, flat, [1.0]).tolist() == [[1.0, 1.0]]


def test_golden() -> None:
    draw = np.random.default_rng(0)
    alignment = Separable.from_slopes(POINTS, draw.normal(size=(5, 4)) - 1, 1.0)
    retention = Separable.from_slopes(POINTS, draw.normal(size=(5, 4)) + 1, 0.0)
    wanted = [[1.0, 1.0, 0.9688897926190165, 0.9173969138428812], [0.0, 0.0, 0.7359933437856503, 0.0]]
    np.testing.assert_allclose(separable_path(alignment, retention, [0.5, 2.0]), wanted, atol=1e-9)


def test_what_does_not_fit_is_refused() -> None:
    model = Separable.from_slopes(POINTS, np.ones((5, 2)), 0.0)
    with pytest.raises(ValueError, match="at least four increasing numbers from 0 to 1"):
        Separable.from_slopes([0, 0.5, 1], np.ones((3, 2)), 0.0)
    with pytest.raises(ValueError, match=r"finite numbers of shape \(5, K\)"):
        Separable.from_slopes(POINTS, np.full((5, 2), np.nan), 0.0)
    with pytest.raises(ValueError, match=r"expected 2 numbers in \[0, 1\]"):
        model.value([0.5, 1.5])
