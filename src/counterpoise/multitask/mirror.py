"""The mathematics of BanditMTL: mirror ascent inside a KL ball around the uniform weights.

Everything here is a pure function in float64. A call handles a few dozen tasks, where Python floats
on the host are faster than one tensor operation per formula, so the functions that end in `_floats`
do the work and the public ones carry tensors in and out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

LOG_FLOOR = math.log(1e-12)
"""No log weight goes below this. At rho >= log m nothing else stops a weight from sinking so low that it never
returns; inside a real ball the floor is invisible (it moves no weight by more than 1e-12)."""

_MAX_ITERATIONS = 200
_NEAR_UNIFORM = 1e-3


class MirrorStep(NamedTuple):
    """The outcome of one ascent step: the new log weights and the multiplier of the KL constraint (0: inactive)."""

    log_p_M: Tensor
    multiplier: float


def ball_radius(tasks: int, min_effective_tasks: float) -> float:
    """The radius rho of the ball whose weights always keep at least that many effective tasks.

    rho = log(m / n): the effective number of tasks, the exponential of the entropy of p, is m exp(-KL(p || uniform)).

    Raises:
        ValueError: min_effective_tasks outside [1, tasks].

    Example:
        >>> round(ball_radius(14, 7), 6)
        0.693147
    """
    if not 1.0 <= min_effective_tasks <= tasks:
        raise ValueError(
            f"min_effective_tasks must lie in [1, {tasks}] for {tasks} tasks, found {min_effective_tasks}: "
            f"{tasks} is uniform weighting, 1 puts no bound on the largest weight."
        )
    return math.log(tasks / min_effective_tasks)


def mirror_step(log_p_M: Tensor, losses_M: Tensor, *, rho: float, eta: float) -> MirrorStep:
    """One step of mirror gradient ascent on <p, losses>, projected onto the KL ball.

    q_i = p_i exp(eta l_i); p_i <- q_i^(1/(1+lambda)) / sum_j q_j^(1/(1+lambda)), where lambda >= 0 is the root of
    KL(p || uniform) = rho, or 0 when q, normalised, is inside the ball. This is the exact maximiser of
    eta <p, l> - KL(p || p_t) over the ball (Mao et al., BanditMTL, ACL 2021).

    Args:
        log_p_M: log weights, (m,); they need not be normalised.
        losses_M: task losses, (m,), any finite values: only differences matter and none is exponentiated raw.
        rho: radius of the ball; infinity drops it (the update of Group DRO).
        eta: step size of the ascent, in 1 / units of loss.

    Returns:
        log weights (float64, normalised, floored at `LOG_FLOOR`) and lambda (infinity when rho = 0).

    Example:
        >>> step = mirror_step(torch.zeros(2), torch.tensor([1.0, 0.4]), rho=0.1, eta=0.5)
        >>> [round(w, 4) for w in step.log_p_M.exp().tolist()]
        [0.5744, 0.4256]
    """
    log_p, multiplier = mirror_floats(log_p_M.tolist(), losses_M.tolist(), rho, eta)
    return MirrorStep(torch.tensor(log_p, dtype=torch.float64), multiplier)


def best_response(losses_M: Tensor, rho: float) -> Tensor:
    """The weights that maximise <p, losses> over the KL ball: proportional to exp(beta l) with KL(p) = rho.

    When the ball reaches the uniform weights over the largest losses (always at rho >= log m), those are returned.

    Args:
        losses_M: task losses, (m,).
        rho: radius of the ball, >= 0.

    Returns:
        float64 weights, (m,).

    Example:
        >>> round(float(best_response(torch.tensor([1.0, 0.4]), 0.02) @ torch.tensor([1.0, 0.4]).double()), 6)
        0.759799
    """
    return torch.tensor(best_response_floats(losses_M.tolist(), rho), dtype=torch.float64)


def divergence(log_p_M: Tensor) -> float:
    """KL(p || uniform) = sum_i p_i log(m p_i), without the cancellation that ruins it near the uniform weights.

    Example:
        >>> divergence(torch.zeros(4))
        0.0
    """
    log_p = log_p_M.tolist()
    top = max(log_p)
    return _tempered([x - top for x in log_p], 1.0).kl


def hold(log_p: Sequence[float], losses: Sequence[float], seen: Sequence[bool], eta: float) -> list[float]:
    """Losses for the tasks that were absent, such that the ascent leaves their joint mass unchanged.

    An absent task gets (1/eta) log(sum_seen p e^(eta l) / sum_seen p), the loss under which its weight keeps its size
    beside the seen tasks taken together. Feeding 0 instead would read as "solved".

    Example:
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


def mirror_floats(log_p: Sequence[float], losses: Sequence[float], rho: float, eta: float) -> tuple[list[float], float]:
    """`mirror_step` on plain floats."""
    log_q = [a + eta * b for a, b in zip(log_p, losses, strict=True)]
    top = max(log_q)
    log_q = [x - top for x in log_q]
    untempered = _tempered(log_q, 1.0)
    if untempered.kl <= rho:
        temper, log_z = 1.0, math.log(untempered.total)
    else:
        temper = _temper(log_q, rho, 1.0, untempered)
        log_q = [temper * x for x in log_q]
        log_z = math.log(sum(map(math.exp, log_q)))
    new = [x - log_z for x in log_q]
    if min(new) < LOG_FLOOR:
        new = [max(x, LOG_FLOOR) for x in new]
        excess = math.log(sum(map(math.exp, new)))
        new = [x - excess for x in new]
    return new, (1.0 / temper - 1.0 if temper > 0.0 else math.inf)


def best_response_floats(losses: Sequence[float], rho: float) -> list[float]:
    """`best_response` on plain floats."""
    top = max(losses)
    spread = top - min(losses)
    if spread == 0.0 or rho == 0.0:
        return [1.0 / len(losses)] * len(losses)
    gaps = [(x - top) / spread for x in losses]
    ties = sum(1 for x in gaps if x == 0.0)
    if rho >= math.log(len(gaps) / ties):
        return [1.0 / ties if x == 0.0 else 0.0 for x in gaps]
    # The root exists. Past this beta every other task has underflowed and the divergence no longer grows.
    furthest = 745.0 / -max(x for x in gaps if x < 0.0)
    beta = _temper(gaps, rho, furthest, _tempered(gaps, furthest))
    weights = [math.exp(beta * x) for x in gaps]
    total = sum(weights)
    return [w / total for w in weights]


class _Tempered(NamedTuple):
    """p = softmax(s log q): its KL from uniform, the mean of log q under it, and the sums behind both."""

    kl: float
    mean: float
    weighted: list[float]
    total: float


def _temper(log_q: Sequence[float], rho: float, upper: float, at: _Tempered) -> float:
    """The s in [0, upper] with KL(softmax(s log q) || uniform) = rho, or `upper` when `at`, there, is inside the ball.

    g(s) = KL - rho is increasing with g' = s Var_{p_s}(log q): Newton from the root of its quadratic expansion, or
    from the upper end when that is near, inside a bracket that bisection falls back on. `log_q` has its maximum at 0.
    """
    if at.kl <= rho:
        return upper
    if rho <= 0.0:
        return 0.0
    low, high = 0.0, upper
    s = upper
    if at.kl >= 2.0 * rho:  # the expansion s^2 Var_u(log q) / 2
        mean = sum(log_q) / len(log_q)
        s = min(upper, math.sqrt(2.0 * rho * len(log_q) / sum([(x - mean) ** 2 for x in log_q])))
    for _ in range(_MAX_ITERATIONS):
        if s < upper:
            at = _tempered(log_q, s)
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


def _tempered(log_q: Sequence[float], s: float) -> _Tempered:
    weights = list(map(math.exp, log_q)) if s == 1.0 else [math.exp(s * x) for x in log_q]
    total = sum(weights)
    weighted = list(map(mul, weights, log_q))
    mean = sum(weighted) / total
    kl = s * mean - math.log(total / len(log_q))
    if kl < _NEAR_UNIFORM:
        kl = _near_uniform([s * (x - mean) for x in log_q])
    return _Tempered(kl, mean, weighted, total)


def _near_uniform(y: Sequence[float]) -> float:
    """KL(softmax(y) || uniform) for almost equal y, as a mean of non-negative terms: nothing cancels.

    With d = m p - 1, whose mean is 0, KL = mean((1 + d) log(1 + d) - d).
    """
    e = [math.expm1(v) for v in y]
    shift = sum(e) / len(e)
    return sum(_entropy_term((v - shift) / (1.0 + shift)) for v in e) / len(e)


def _entropy_term(d: float) -> float:
    """(1 + d) log(1 + d) - d, by its series for small d."""
    if abs(d) < _NEAR_UNIFORM:
        return d * d * (1 / 2 - d * (1 / 6 - d * (1 / 12 - d * (1 / 20 - d * (1 / 30 - d / 42)))))
    return (1.0 + d) * math.log1p(d) - d if d > -1.0 else 1.0


def _log_sum_exp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))
