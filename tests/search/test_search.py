"""Projection, spectral descent and HMA."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq, minimize

from counterpoise.averaging.partition import layerwise, thirds
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.preflight import preflight
from counterpoise.search.descent import spectral_descent
from counterpoise.search.hma import hma, linear_ramp, project, random_ratios
from test_resident import proxies
from tiny import save_pair

SIZES = st.integers(1, 12)


@st.composite
def problems(draw: st.DrawFn):  # type: ignore[no-untyped-def]
    k = draw(SIZES)
    y = draw(arrays(float, k, elements=st.floats(-5, 5)))
    w = draw(arrays(float, k, elements=st.floats(0.1, 10)))
    return y, draw(st.floats(0, 1)), w


@settings(max_examples=400)
@given(problems())
def test_projection_is_feasible_and_solves_the_conditions(problem) -> None:  # type: ignore[no-untyped-def]
    y, mean, w = problem
    r = project(y, mean, w)
    assert ((r >= 0) & (r <= 1)).all()
    assert float(w @ r / w.sum()) == pytest.approx(mean, abs=1e-12)
    if 0 < mean < 1:  # one tau for all coordinates, found by bisection
        tau = brentq(lambda t: float(w @ np.clip(y - t, 0, 1) / w.sum()) - mean, y.min() - 1, y.max() + 1, xtol=1e-14)
        np.testing.assert_allclose(r, np.clip(y - tau, 0, 1), atol=1e-9)


@settings(max_examples=100)
@given(problems(), st.randoms())
def test_projection_does_not_see_order_or_splitting(problem, random) -> None:  # type: ignore[no-untyped-def]
    y, mean, w = problem
    r = project(y, mean, w)
    order = random.sample(range(len(y)), len(y))
    np.testing.assert_allclose(project(y[order], mean, w[order]), r[order], atol=1e-12)
    split = project(np.append(y, y[0]), mean, np.append(w, w[0] / 2) - np.eye(len(y) + 1)[0] * w[0] / 2)
    np.testing.assert_allclose(split[:-1], r, atol=1e-12)
    assert split[-1] == pytest.approx(split[0], abs=1e-12)


def test_a_mean_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mean: expected a number in \[0.0, 1.0\], found 1.2"):
        project([0.5], 1.2, [1.0])


def quadratic(k: int, seed: int):  # type: ignore[no-untyped-def]
    random = np.random.default_rng(seed)
    root = random.normal(size=(k, k))
    matrix, centre = root @ root.T + 0.1 * np.eye(k), random.uniform(-0.5, 1.5, size=k)
    return lambda r: (float(0.5 * (r - centre) @ matrix @ (r - centre)), matrix @ (r - centre))


@pytest.mark.parametrize("k", [2, 3, 9])
@pytest.mark.parametrize("seed", range(5))
def test_descent_finds_the_constrained_optimum_of_quadratics(k: int, seed: int) -> None:
    function, w = quadratic(k, seed), np.random.default_rng(seed).uniform(1, 3, size=k)
    start = project(np.full(k, 0.4), 0.4, w)
    found = spectral_descent(function, start, lambda y: project(y, 0.4, w), w, max_passes=400, tolerance=1e-13)
    equality = {"type": "eq", "fun": lambda r: w @ r / w.sum() - 0.4}
    best = minimize(function, start, jac=True, bounds=[(0, 1)] * k, constraints=equality, method="SLSQP",
                    options={"ftol": 1e-14, "maxiter": 500})  # fmt: skip
    assert found.converged
    assert found.value == pytest.approx(best.fun, abs=1e-6)


def test_descent_never_ends_above_its_start_nor_beyond_its_passes() -> None:
    for seed in range(30):
        a = np.random.default_rng(seed).normal(size=(3, 4)) * 6

        def wavy(r: np.ndarray, a: np.ndarray = a) -> tuple[float, np.ndarray]:
            return float(np.sin(r @ a).sum()), a @ np.cos(r @ a)

        w = np.ones(3)
        found = spectral_descent(
            wavy, np.full(3, 0.5), lambda y: project(y, 0.5, np.ones(3)), w, max_passes=7, tolerance=1e-9
        )
        assert found.value <= found.trace[0]
        assert found.passes <= 7
        assert found.value == pytest.approx(wavy(np.array(found.ratios))[0])


def test_a_large_common_slope_does_not_hide_the_rest() -> None:
    """Keeping more of everything always helps; the mean constraint takes that away, and what is left still decides."""
    weights, best = np.ones(3), np.array([0.1, 0.5, 0.9])

    def tilted(r: np.ndarray) -> tuple[float, np.ndarray]:
        return 0.05 * float(((r - best) ** 2).sum()) - 30.0 * float(r.sum()), 0.1 * (r - best) - 30.0

    found = spectral_descent(
        tilted, np.full(3, 0.5), lambda y: project(y, 0.5, weights), weights, max_passes=12, tolerance=1e-6
    )
    np.testing.assert_allclose(found.ratios, best, atol=1e-3)


def test_hma_comes_within_two_thousandths_of_the_best_grid_point(tmp_path: Path) -> None:
    pair = preflight(*save_pair(tmp_path, "gpt2", scale=0.15))
    resident, cut, data = ResidentAverage(pair), thirds(pair.names), proxies()
    found = hma(resident, cut, data.backward, 0.5)
    best = float("inf")
    for a, b in itertools.product(np.arange(0, 1.01, 0.05), repeat=2):
        if 0 <= (c := 1.5 - a - b) <= 1:
            resident.set(cut, [a, b, c])
            best = min(best, data.nll(resident.model))
    assert found.trace[0] - best > 0.004  # there is something to find
    assert found.value <= best + 0.002
    assert found.passes <= 12
    assert cut.mean(found.ratios) == pytest.approx(0.5, abs=1e-12)
    again = hma(ResidentAverage(pair), cut, data.backward, 0.5)
    assert again == found


def test_hma_at_the_ends_is_the_ends(tmp_path: Path) -> None:
    pair = preflight(*save_pair(tmp_path))
    resident, cut = ResidentAverage(pair), thirds(pair.names)
    for mean in (0.0, 1.0):
        found = hma(resident, cut, proxies().backward, mean)
        assert found.ratios == (mean,) * 3
        assert found.passes == 1


@given(st.floats(0, 1), st.one_of(st.floats(0, 50), st.just(math.inf)), st.booleans())
def test_every_slope_has_the_mean_and_grows_with_depth(mean: float, slope: float, outside: bool) -> None:
    cut = layerwise(["embed.w", *(f"layers.{i}.w" for i in range(12))])
    cut = cut.with_rest_block() if outside else cut
    ratios = linear_ramp(cut, mean, slope)
    assert cut.mean(ratios) == pytest.approx(mean, abs=1e-12)
    assert ((ratios >= 0) & (ratios <= 1)).all()
    assert (np.diff(ratios[:12]) >= -1e-12).all()
    assert cut.ratios(["embed.w"], ratios)["embed.w"] == pytest.approx(ratios[0] if outside else mean, abs=1e-12)


@given(st.floats(0, 1))
def test_slope_0_is_plain_averaging_and_slope_1_is_lines_bit_for_bit(mean: float) -> None:
    cut = layerwise([f"layers.{i}.w" for i in range(7)])
    assert linear_ramp(cut, mean, 0).tolist() == [mean] * 7
    start, end = (2 * mean - 1, 1.0) if mean >= 0.5 else (0.0, 2 * mean)
    lines = project(start + (end - start) * (np.arange(7) / 6), mean, cut.weights)  # as before there were slopes
    assert linear_ramp(cut, mean).tolist() == linear_ramp(cut, mean, 1.0).tolist() == lines.tolist()


@given(st.floats(0.01, 0.99))
def test_the_step_is_the_limit_of_ramps(mean: float) -> None:
    cut = layerwise([f"layers.{i}.w" for i in range(12)])
    step = linear_ramp(cut, mean, math.inf)
    assert ((step > 1e-9) & (step < 1 - 1e-9)).sum() <= 1
    np.testing.assert_allclose(linear_ramp(cut, mean, 1e5), step, atol=1e-6)


@given(st.floats(0, 1))
def test_ramps_have_the_mean_and_the_slope(mean: float) -> None:
    cut = layerwise([f"layers.{i}.w" for i in range(12)])
    up, down = linear_ramp(cut, mean), linear_ramp(cut, mean, -1)
    drawn = random_ratios(cut, mean, seed=3)
    for ratios in (up, down, drawn):
        assert cut.mean(ratios) == pytest.approx(mean, abs=1e-12)
    assert (np.diff(up) >= -1e-12).all()
    np.testing.assert_allclose(up, down[::-1], atol=1e-12)
