"""No ability left behind: the worst mixture of several retention losses over BanditMTL's KL ball."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from counterpoise.multitask.mirror import best_response, mirror_step
from counterpoise.statistics.bootstrap import Array

_DUAL_STEPS = 400


class Worst(NamedTuple):
    """max_p sum_t p_t R_t, its gradient with respect to the ratios, and the p that attains it."""

    value: float
    gradient: Array
    weights: Array


def worst(values_T: ArrayLike, gradients_TK: ArrayLike, rho: float) -> Worst:
    """The largest sum_t p_t R_t over KL(p || uniform) <= rho, by BanditMTL's own adversary (Mao et al., ACL 2021).

    The gradient is sum_t p*_t dR_t / dr (Danskin): exact wherever the best response is unique, which fails only where
    rho reaches log(T / ties). rho = 0 is the plain mean; log(T / n) keeps at least n effective sets.

    Args:
        values_T: R_t in comparable units, shape (T,).
        gradients_TK: dR_t / dr_k, shape (T, K).
        rho: radius of the ball, >= 0.

    >>> worst([1.0, 0.4], [[1.0], [0.0]], 0.0).value
    0.7
    >>> round(worst([1.0, 0.4], [[1.0], [0.0]], 0.02).value, 6)
    0.759799
    """
    values, gradients = np.asarray(values_T, dtype=np.float64), np.asarray(gradients_TK, dtype=np.float64)
    if not rho >= 0:
        raise ValueError(f"rho: expected a number >= 0 (the radius of the KL ball), found {rho}")
    p = best_response(torch.from_numpy(values), rho).numpy()
    return Worst(float(p @ values), p @ gradients, p)


class Sides(NamedTuple):
    """Both sides at some ratios, scaled: F_A, its gradient (K,), the R_t (T,) and their gradients (T, K)."""

    value: float
    gradient: Array
    values: Array
    gradients: Array

    def priced(self, weight: float, rho: float) -> tuple[float, Array]:
        """F_A + lambda max_p sum_t p_t R_t and its gradient."""
        most = worst(self.values, self.gradients, rho)
        return self.value + weight * most.value, self.gradient + weight * most.gradient


def minimax_descent(
    evaluate: Callable[[Array], Sides], start: Array, *, weight: float, rho: float, max_passes: int, tolerance: float
) -> tuple[Array, bool]:
    """Descend F_A + lambda max_p sum_t p_t R_t over the unit box, through its kinks.

    Where the R_t are equal the maximum has a kink, and that is where minima tend to be: a gradient step stalls there.
    Each step here linearises the sides, not their maximum, and minimises that maximum plus |d|^2 / (2 length) (the
    prox-linear method); `length` grows after a step that kept its promise and shrinks after one that did not. The first
    step moves the furthest ratio by a tenth.

    Args:
        tolerance: stop when the linearised problem promises less than this.

    Returns:
        The best ratios, and whether it converged.
    """
    r = np.clip(start, 0.0, 1.0)
    at = evaluate(r)
    value, slope = at.priced(weight, rho)
    length = 0.1 / max(float(np.abs(slope).max()), 1e-30)
    for _ in range(max_passes - 1):
        trial, promise = prox_step(r, at, weight=weight, rho=rho, length=length)
        if promise < tolerance:
            return r, True
        found = evaluate(trial)
        reached, _ = found.priced(weight, rho)
        kept = (value - reached) / promise
        if kept > 1e-4:
            r, at, value = trial, found, reached
        length *= 2.5 if kept > 0.7 else 1.0 if kept > 0.3 else 0.35
    return r, False


def prox_step(ratios: Array, at: Sides, *, weight: float, rho: float, length: float) -> tuple[Array, float]:
    """The point that minimises the linearised objective plus |d|^2 / (2 length) in the box, and the decrease it promises.

    Its dual is a concave problem in p over the KL ball, climbed by BanditMTL's mirror step at the step size its
    smoothness allows; for each p the best d is a projected gradient step.
    """
    _, slope, values, gradients = at
    smoothness = length * weight**2 * float((gradients**2).sum(1).max())
    eta = 1.0 / max(smoothness, 1e-12)
    log_p = [-float(np.log(len(values)))] * len(values)
    now = worst(values, gradients, rho).value
    best, promise = ratios, 0.0
    for step in range(1, _DUAL_STEPS + 1):
        p = np.exp(log_p)
        trial = np.clip(ratios - length * (slope + weight * (p @ gradients)), 0.0, 1.0)
        d = trial - ratios
        ahead = values + gradients @ d
        if step % 10 == 0:
            most = worst(ahead, gradients, rho).value
            gain = -float(slope @ d + weight * (most - now) + d @ d / (2 * length))
            if gain > promise:
                best, promise = trial, gain
            if weight * (most - float(p @ ahead)) <= 0.01 * gain:  # the duality gap
                break
        log_p, _ = mirror_step(log_p, (weight * ahead).tolist(), rho, eta)
    return best, promise
