"""The mathematics of BanditMTL: mirror ascent inside a KL ball around a prior, by default the uniform weights.

Everything here is a pure function in float64. A call handles a few dozen tasks, where Python floats on the host are
faster than one tensor operation per formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul, sub
from typing import NamedTuple

import torch
from torch import Tensor

LOG_FLOOR = math.log(1e-12)
"""No log weight goes below this. At rho >= log m nothing else stops a weight from sinking so low that it never
returns; inside a real ball the floor is invisible (it moves no weight by more than 1e-12)."""

_MAX_ITERATIONS = 200
_NEAR_UNIFORM = 1e-3


def ball_radius(tasks: int, min_effective_tasks: float) -> float:
    """The radius rho of the ball whose weights always keep at least that many effective tasks.

    rho = log(m / n): the effective number of tasks, the exponential of the entropy of p, is m exp(-KL(p || uniform)).

    Raises:
        ValueError: min_effective_tasks outside [1, tasks].

    Examples:
        >>> round(ball_radius(14, 7), 6)
        0.693147
    """
    if not 1.0 <= min_effective_tasks <= tasks:
        raise ValueError(
            f"min_effective_tasks must lie in [1, {tasks}] for {tasks} tasks, found {min_effective_tasks}: "
            f"{tasks} is uniform weighting, 1 puts no bound on the largest weight."
        )
    return math.log(tasks / min_effective_tasks)


def best_response(losses_M: Tensor, rho: float, prior_M: Tensor | None = None) -> Tensor:
    """The weights that maximise <p, losses> over the KL ball: p_i ~ prior_i exp(beta l_i) with KL(p || prior) = rho.

    When the ball reaches the prior's weights over the largest losses alone (always at rho >= log(1 / min prior), log m
    for the uniform prior), those are returned.

    Args:
        losses_M: task losses, (m,).
        rho: radius of the ball, >= 0.
        prior_M: the ball's centre, (m,), positive, of any sum; uniform by default.

    Returns:
        float64 weights, (m,).

    Examples:
        >>> round(float(best_response(torch.tensor([1.0, 0.4]), 0.02) @ torch.tensor([1.0, 0.4]).double()), 6)
        0.759799
    """
    prior = None if prior_M is None else prior_M.tolist()
    return torch.tensor(best_response_floats(losses_M.tolist(), rho, prior), dtype=torch.float64)


def divergence(log_p_M: Tensor, prior_M: Tensor | None = None) -> float:
    """KL(p || prior) = sum_i p_i log(p_i / prior_i), without the cancellation that ruins it near the prior.

    The prior is uniform by default. Neither p nor the prior need add up to 1.

    Examples:
        >>> divergence(torch.zeros(4))
        0.0
    """
    prior = [1.0] * len(log_p_M) if prior_M is None else prior_M.tolist()
    ratios = [x - math.log(c) for x, c in zip(log_p_M.tolist(), prior, strict=True)]
    top = max(ratios)
    return _tempered([max(x - top, -1e4) for x in ratios], 1.0, prior).kl  # a weight of 0 adds 0, not nan


def hold(log_p: Sequence[float], losses: Sequence[float], seen: Sequence[bool], eta: float) -> list[float]:
    """Losses for the tasks that were absent, such that the ascent leaves their joint mass unchanged.

    An absent task gets (1/eta) log(sum_seen p e^(eta l) / sum_seen p), the loss under which its weight keeps its size
    beside the seen tasks taken together. Feeding 0 instead would read as "solved".

    Examples:
        >>> hold([math.log(0.5)] * 2, [0.7, 0.0], [True, False], eta=0.5)
        [0.7, 0.7]
    """
    present = [i for i, here in enumerate(seen) if here]
    before = [log_p[i] for i in present]
    after = [log_p[i] + eta * losses[i] for i in present]
    # Removing the largest loss first makes one seen task give back its loss exactly.
    level = max(losses[i] for i in present)
    filled = level + (_log_sum_exp([a - eta * level for a in after]) - _log_sum_exp(before)) / eta
    return [loss if here else filled for loss, here in zip(losses, seen, strict=True)]


def mirror_step(
    log_p: Sequence[float], losses: Sequence[float], rho: float, eta: float, prior: Sequence[float] | None = None
) -> tuple[list[float], float]:
    """One step of mirror gradient ascent on <p, losses>, projected onto the KL ball.

    q_i = p_i exp(eta l_i); p_i <- q_i^s prior_i^(1-s) / sum_j q_j^s prior_j^(1-s) with s = 1 / (1 + lambda), where
    lambda >= 0 is the root of KL(p || prior) = rho, or 0 when q, normalised, is inside the ball. This is the exact
    maximiser of eta <p, l> - KL(p || p_t) over the ball (Mao et al., BanditMTL, ACL 2021, whose prior is uniform).

    Args:
        log_p: log weights of m tasks; they need not be normalised.
        losses: any finite values: only differences matter and none is exponentiated raw.
        rho: radius of the ball; infinity drops it (the update of Group DRO).
        eta: step size of the ascent, in 1 / units of loss.
        prior: the ball's centre, positive, of any sum; uniform by default.

    Returns:
        log weights, normalised and floored at `LOG_FLOOR`, and lambda (infinity when rho = 0).

    Examples:
        >>> log_p, _ = mirror_step([0.0, 0.0], [1.0, 0.4], rho=0.1, eta=0.5)
        >>> [round(math.exp(x), 4) for x in log_p]
        [0.5744, 0.4256]
    """
    highest = max(losses)  # taken off first: eta * 1e12 would swallow what the losses differ by
    log_q = [a + eta * (b - highest) for a, b in zip(log_p, losses, strict=True)]
    log_prior = [0.0] * len(log_q)
    if prior is not None:
        log_prior = list(map(math.log, prior))
        log_q = list(map(sub, log_q, log_prior))
    prior = prior or [1.0] * len(log_q)
    top = max(log_q)
    log_q = [x - top for x in log_q]  # from here on log(q / prior)
    at = _tempered(log_q, 1.0, prior)
    temper = 1.0
    if at.kl > rho:
        temper = _temper(log_q, rho, 1.0, at, prior)
        log_q = [temper * x for x in log_q]
        at = _tempered(log_q, 1.0, prior)
    log_z = math.log(at.total)
    new = [x + c - log_z for x, c in zip(log_q, log_prior, strict=True)]
    if min(new) < LOG_FLOOR:
        new = [max(x, LOG_FLOOR) for x in new]
        excess = math.log(sum(map(math.exp, new)))
        new = [x - excess for x in new]
    return new, (1.0 / temper - 1.0 if temper > 0.0 else math.inf)


def best_response_floats(losses: Sequence[float], rho: float, prior: Sequence[float] | None = None) -> list[float]:
    """`best_response` on plain floats."""
    prior = prior or [1.0] * len(losses)
    everything = sum(prior)
    top = max(losses)
    spread = top - min(losses)
    if spread == 0.0 or rho == 0.0:
        return [c / everything for c in prior]
    gaps = [(x - top) / spread for x in losses]
    ties = sum(c for x, c in zip(gaps, prior, strict=True) if x == 0.0)
    if rho >= math.log(everything / ties):
        return [c / ties if x == 0.0 else 0.0 for x, c in zip(gaps, prior, strict=True)]
    # The root exists. Past this beta every other task has underflowed and the divergence no longer grows.
    furthest = 745.0 / -max(x for x in gaps if x < 0.0)
    beta = _temper(gaps, rho, furthest, _tempered(gaps, furthest, prior), prior)
    weights = [c * math.exp(beta * x) for x, c in zip(gaps, prior, strict=True)]
    total = sum(weights)
    return [w / total for w in weights]


class _Tempered(NamedTuple):
    """p ~ prior (q / prior)^s: its KL from the prior, the mean of log(q / prior) under it, and the sums behind both."""

    kl: float
    mean: float
    weighted: list[float]
    total: float


def _temper(log_q: Sequence[float], rho: float, upper: float, at: _Tempered, prior: Sequence[float]) -> float:
    """The s in [0, upper] with KL(p_s || prior) = rho, or `upper` when `at`, there, is inside the ball.

    `log_q` is log(q / prior) with its maximum at 0, and p_s ~ prior exp(s log_q). g(s) = KL - rho is increasing with
    g' = s Var_{p_s}(log_q): Newton from the root of its quadratic expansion, or from the upper end when that is near,
    inside a bracket that bisection falls back on.
    """
    if at.kl <= rho:
        return upper
    if rho <= 0.0:
        return 0.0
    low, high = 0.0, upper
    s = upper
    if at.kl >= 2.0 * rho:  # the expansion s^2 Var_prior(log_q) / 2
        everything = sum(prior)
        mean = sum(map(mul, prior, log_q)) / everything
        squares = sum([c * (x - mean) ** 2 for x, c in zip(log_q, prior, strict=True)])
        s = min(upper, math.sqrt(2.0 * rho * everything / squares)) if squares > 0.0 else upper
    for _ in range(_MAX_ITERATIONS):
        if s < upper:
            at = _tempered(log_q, s, prior)
        if at.kl > rho:
            high = s
        else:
            low = s
        slope = s * (sum(map(mul, at.weighted, log_q)) / at.total - at.mean * at.mean)
        step = (at.kl - rho) / slope if slope > 0.0 else math.inf
        guess = s - step
        if not low <= guess <= high:
            guess = 0.5 * (low + high)
        elif abs(step) <= 1e-8 * s:  # the next step would be of the order of its square
            return guess
        if guess in (low, high, s) or high - low <= 1e-16 * high:
            return guess
        s = guess
    return low


def _tempered(log_q: Sequence[float], s: float, prior: Sequence[float]) -> _Tempered:
    weights = list(map(mul, prior, map(math.exp, log_q if s == 1.0 else [s * x for x in log_q])))
    total = sum(weights)
    weighted = list(map(mul, weights, log_q))
    mean = sum(weighted) / total
    kl = s * mean - math.log(total / sum(prior))
    if kl < _NEAR_UNIFORM:
        kl = _near_prior([s * (x - mean) for x in log_q], prior)
    return _Tempered(kl, mean, weighted, total)


def _near_prior(y: Sequence[float], prior: Sequence[float]) -> float:
    """KL(p || prior) for p ~ prior exp(y) with almost equal y, as a mean of non-negative terms: nothing cancels.

    With d = p / prior - 1, whose mean under the prior is 0, KL = E_prior((1 + d) log(1 + d) - d).
    """
    e, everything = [math.expm1(v) for v in y], sum(prior)
    shift = sum(map(mul, prior, e)) / everything
    return sum([c * _entropy_term((v - shift) / (1.0 + shift)) for v, c in zip(e, prior, strict=True)]) / everything


def _entropy_term(d: float) -> float:
    """(1 + d) log(1 + d) - d, by its series for small d."""
    if abs(d) < _NEAR_UNIFORM:
        return d * d * (1 / 2 - d * (1 / 6 - d * (1 / 12 - d * (1 / 20 - d * (1 / 30 - d / 42)))))
    return (1.0 + d) * math.log1p(d) - d if d > -1.0 else 1.0


def _log_sum_exp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))
