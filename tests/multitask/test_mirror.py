"""Every provable property of BanditMTL's mathematics, on the pure functions."""

import math
import random

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize

from counterpoise.multitask.mirror import (
    LOG_FLOOR,
    ball_radius,
    best_response,
    best_response_floats,
    divergence,
    hold,
    mirror_step,
)

UNIFORM = {m: [-math.log(m)] * m for m in range(2, 60)}


def maximum(losses: list[float], rho: float) -> float:
    return math.fsum(p * x for p, x in zip(best_response_floats(losses, rho), losses, strict=True))


def plain_kl(p: list[float]) -> float:
    return math.fsum(x * math.log(len(p) * x) for x in p if x > 0)


def random_case(rng: random.Random) -> tuple[list[float], list[float], float, float]:
    m = rng.randint(2, 59)
    raw = [rng.gauss(0, 1) for _ in range(m)]
    shift = math.log(sum(map(math.exp, raw)))
    rho = math.exp(rng.uniform(math.log(1e-8), math.log(math.log(m))))
    size = math.exp(rng.uniform(math.log(1e-6), math.log(1e4)))
    return [x - shift for x in raw], [rng.random() * size for _ in range(m)], rho, rng.choice([0.05, 0.5, 2.0])


def test_expansion_of_the_maximum_in_rho():
    rng = np.random.default_rng(0)
    radii = np.logspace(-4, -2, 9)
    for _ in range(10):
        losses = rng.exponential(size=8)
        centred = losses - losses.mean()
        variance, third = (centred**2).mean(), (centred**3).mean()
        two_terms = losses.mean() + np.sqrt(2 * radii * variance) + radii * third / (3 * variance)
        residual = np.abs([maximum(losses.tolist(), r) for r in radii] - two_terms)
        assert np.all(residual <= 5 * losses.std() * radii**1.5)
        slope = np.polyfit(np.log(radii), np.log(residual), 1)[0]
        assert abs(slope - 1.5) <= 0.1


def test_the_value_of_two_tasks():
    assert maximum([1.0, 0.4], 0.02) == pytest.approx(0.759799, abs=5e-7)


@given(
    st.lists(st.floats(0, 100, allow_subnormal=False), min_size=2, max_size=12),
    st.floats(1e-8, 4.0),
)
def test_the_maximum_is_near_the_mean(losses, rho):
    bound = (max(losses) - min(losses)) * math.sqrt(rho / 2)
    assert maximum(losses, rho) - math.fsum(losses) / len(losses) <= bound + 1e-12 * max(losses) + 1e-300


@pytest.mark.parametrize("seed", range(12))
def test_projection_equals_a_constrained_solver(seed):
    rng = np.random.default_rng(seed)
    m, rho, eta = int(rng.integers(2, 7)), float(rng.uniform(0.02, 0.5)), 1.0
    p_t, losses = rng.dirichlet(np.full(m, 3.0)), rng.uniform(0, 3, m)
    solved = minimize(
        lambda p: -(eta * p @ losses - p @ np.log(p / p_t)),
        np.full(m, 1 / m),
        jac=lambda p: -(eta * losses - np.log(p / p_t) - 1),
        constraints=[
            {"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones(m)},
            {"type": "ineq", "fun": lambda p: rho - p @ np.log(m * p), "jac": lambda p: -np.log(m * p) - 1},
        ],
        bounds=[(1e-9, 1)] * m,
        method="SLSQP",
        options={"ftol": 1e-16, "maxiter": 500},
    )
    log_p, _ = mirror_step(np.log(p_t).tolist(), losses.tolist(), rho=rho, eta=eta)
    np.testing.assert_allclose(np.exp(log_p), solved.x, atol=1e-7)


def test_a_step_stays_inside_the_ball_and_the_simplex_in_5000_random_cases():
    rng = random.Random(0)
    for _ in range(5000):
        log_p, losses, rho, eta = random_case(rng)
        new, multiplier = mirror_step(log_p, losses, rho, eta)
        p = [math.exp(x) for x in new]
        assert divergence(torch.tensor(new, dtype=torch.float64)) <= rho * (1 + 1e-9)
        assert abs(math.fsum(p) - 1) <= 1e-12
        assert min(p) > 0
        assert multiplier >= 0


def test_invariance_equivariance_monotonicity_in_5000_random_cases():
    rng = random.Random(1)
    for _ in range(5000):
        log_p, losses, rho, eta = random_case(rng)
        p = [math.exp(x) for x in mirror_step(log_p, losses, rho, eta)[0]]
        # Adding c loses up to c * 2^-53 of each loss, which eta turns into a relative change of p.
        c, size = rng.uniform(-10, 10), max(losses)
        shifted = [math.exp(x) for x in mirror_step(log_p, [x + c for x in losses], rho, eta)[0]]
        assert p == pytest.approx(shifted, abs=1e-12 + 1e-14 * eta * (size + abs(c)))
        order = rng.sample(range(len(p)), len(p))
        permuted = mirror_step([log_p[i] for i in order], [losses[i] for i in order], rho, eta)[0]
        assert [p[i] for i in order] == pytest.approx([math.exp(x) for x in permuted], abs=1e-12)
        i = rng.randrange(len(p))
        raised = [x + (size if k == i else 0) for k, x in enumerate(losses)]
        assert math.exp(mirror_step(log_p, raised, rho, eta)[0][i]) >= p[i] - 1e-12


@given(st.integers(2, 20), st.floats(0.1, 3.0), st.integers(0, 10**6))
@settings(max_examples=40)
def test_frozen_losses_lead_to_the_best_response(m, sharpness, seed):
    # On the boundary a step shrinks the distance by beta / (beta + eta): 1e-6 in 200 steps needs, besides
    # eta range(l) 200 >= 50, that beta range(l) <= 3 or so. At sharpness 12 the same 200 steps leave 1e-2.
    losses = [random.Random(seed + i).random() for i in range(m)]
    spread = max(losses) - min(losses)
    weights = [math.exp(sharpness * x / spread) for x in losses]
    target = [w / math.fsum(weights) for w in weights]
    rho, log_p = plain_kl(target), UNIFORM[m]
    for _ in range(200):
        log_p, _ = mirror_step(log_p, losses, rho, 50 / (200 * spread))
    assert [math.exp(x) for x in log_p] == pytest.approx(target, abs=1e-6)
    assert best_response_floats(losses, rho) == pytest.approx(target, abs=1e-6)


@given(st.lists(st.floats(0, 10, allow_subnormal=False), min_size=2, max_size=20, unique=True), st.floats(0.001, 0.9))
def test_best_response_is_exponential_in_the_losses_with_kl_rho(losses, share):
    spread = max(losses) - min(losses)
    rho = share * math.log(len(losses))
    p = best_response_floats(losses, rho)
    assert plain_kl(p) == pytest.approx(rho, rel=1e-6)
    top, low = p[losses.index(max(losses))], p[losses.index(min(losses))]
    if min(p) > 1e-200 and spread > 1e-6:
        beta = math.log(top / low) / spread
        level = math.log(top) - beta * max(losses)
        assert [math.log(x) for x in p] == pytest.approx([beta * x + level for x in losses], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("m", "rho"), [(2, 0.1), (10, 0.5), (10, 2.0)])
def test_regret_is_at_most_sqrt_rho_t_over_2(m, rho):
    steps = 1000
    eta = math.sqrt(8 * rho / steps)
    for seed in range(3):
        rng = random.Random(seed)
        log_p, earned, totals = UNIFORM[m], 0.0, [0.0] * m
        for t in range(steps):
            # The third adversary punishes whatever the weights favour.
            losses = [
                rng.random() if seed == 0 else float((t + i) % 2) if seed == 1 else float(log_p[i] < -math.log(m))
                for i in range(m)
            ]
            earned += sum(math.exp(a) * x for a, x in zip(log_p, losses, strict=True))
            totals = [a + b for a, b in zip(totals, losses, strict=True)]
            log_p, _ = mirror_step(log_p, losses, rho, eta)
        assert maximum(totals, rho) - earned <= math.sqrt(rho * steps / 2)


def test_the_gap_of_the_averages_falls_like_one_over_sqrt_t():
    targets, rho, width = torch.tensor([-1.0, 0.2, 1.0], dtype=torch.float64), 0.3, 1.0
    gaps = []
    for steps in (100, 400, 1600):
        # Losses |theta - c_i| <= 2 on [-1, 1]: Lipschitz 1, so the two regrets bound the gap.
        eta, rate = math.sqrt(8 * rho / steps) / 2, 2 * width / math.sqrt(steps)
        theta, log_p = 0.9, UNIFORM[3]
        mean_theta, mean_p = 0.0, torch.zeros(3, dtype=torch.float64)
        for _ in range(steps):
            p = torch.tensor(log_p, dtype=torch.float64).exp()
            mean_theta, mean_p = mean_theta + theta / steps, mean_p + p / steps
            losses = (theta - targets).abs()
            descent = float(p @ torch.sign(theta - targets))
            log_p, _ = mirror_step(log_p, losses.tolist(), rho, eta)
            theta = max(-width, min(width, theta - rate * descent))
        grid = torch.linspace(-1, 1, 4001, dtype=torch.float64)
        least = float(((grid[:, None] - targets).abs() @ mean_p).min())
        gaps.append(maximum((mean_theta - targets).abs().tolist(), rho) - least)
        assert 0 <= gaps[-1] <= (2 * width + 2 * math.sqrt(rho / 2)) / math.sqrt(steps)
    assert gaps[2] <= gaps[0] / 3  # sixteen times the steps: four times smaller, or better


def test_danskin_the_gradient_of_the_maximum_is_the_best_response():
    rng = random.Random(0)
    for _ in range(20):
        losses, rho = [rng.random() for _ in range(6)], rng.uniform(0.05, 0.5)
        p, h = best_response_floats(losses, rho), 5e-4
        for i in range(6):
            moved = [maximum([x + k * h * (j == i) for j, x in enumerate(losses)], rho) for k in (-3, -2, -1, 1, 2, 3)]
            sixth_order = np.dot(moved, [-1, 9, -45, 45, -9, 1]) / (60 * h)
            assert sixth_order == pytest.approx(p[i], abs=1e-10)


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-5, 1e-7])
def test_divergence_does_not_cancel_near_uniform(size):
    rng = random.Random(0)
    log_p = [rng.random() * size for _ in range(7)]
    mpmath.mp.dps = 60
    weights = [mpmath.exp(x) for x in map(mpmath.mpf, log_p)]
    exact = sum(w / sum(weights) * mpmath.log(7 * w / sum(weights)) for w in weights)
    assert divergence(torch.tensor(log_p, dtype=torch.float64)) == pytest.approx(float(exact), rel=1e-12)


def test_huge_losses_do_not_overflow():
    log_p, _ = mirror_step([0.0] * 3, [1e8, 0.0, -1e8], rho=0.5, eta=0.5)
    assert divergence(torch.tensor(log_p, dtype=torch.float64)) == pytest.approx(0.5, rel=1e-9)
    assert log_p[0] == max(log_p)


def test_rho_zero_is_uniform_and_a_wide_ball_does_nothing():
    losses = [3.0, 1.0, 2.0]
    log_p, multiplier = mirror_step([0.0] * 3, losses, rho=0.0, eta=0.5)
    assert log_p == pytest.approx([-math.log(3)] * 3)
    assert multiplier == math.inf
    log_p, multiplier = mirror_step([0.0] * 3, losses, rho=math.inf, eta=0.5)
    assert log_p == pytest.approx(torch.log_softmax(0.5 * torch.tensor(losses, dtype=torch.float64), 0).tolist())
    assert multiplier == 0


def test_without_a_ball_a_starved_weight_returns():
    log_p = UNIFORM[2]
    for _ in range(1000):
        log_p, _ = mirror_step(log_p, [1.0, 0.0], math.inf, 0.5)
    assert log_p[1] == pytest.approx(LOG_FLOOR, abs=1e-9)
    for _ in range(60):
        log_p, _ = mirror_step(log_p, [0.0, 1.0], math.inf, 0.5)
    assert math.exp(log_p[1]) > 0.5


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans()), min_size=3, max_size=10), st.floats(0.05, 2))
def test_hold_leaves_the_absent_tasks_their_mass(rows, eta):
    losses, seen = [x for x, _ in rows], [b for _, b in rows]
    if not any(seen) or all(seen):
        return
    log_p = UNIFORM[len(rows)]
    filled = hold(log_p, losses, seen, eta)
    new, _ = mirror_step(log_p, filled, math.inf, eta)
    absent = math.fsum(math.exp(x) for x, here in zip(new, seen, strict=True) if not here)
    assert absent == pytest.approx(seen.count(False) / len(seen), rel=1e-9)


def test_best_response_at_ties_and_extremes():
    assert best_response(torch.tensor([2.0, 1.0, 2.0]), 5.0).tolist() == [0.5, 0.0, 0.5]
    assert best_response(torch.tensor([2.0, 1.0]), 0.0).tolist() == [0.5, 0.5]
    assert best_response(torch.tensor([2.0, 2.0]), 0.1).tolist() == [0.5, 0.5]
    near = best_response_floats([1.0, 1.0 - 1e-13, 0.0], 0.9)
    assert plain_kl(near) == pytest.approx(0.9, rel=1e-6)


def test_ball_radius_keeps_that_many_tasks():
    assert ball_radius(14, 14) == 0
    assert ball_radius(14, 1) == pytest.approx(math.log(14))
    for bad in (0.5, 14.5, math.nan):
        with pytest.raises(ValueError, match=r"\[1, 14\]"):
            ball_radius(14, bad)
