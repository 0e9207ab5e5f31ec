"""Projected gradient descent with spectral step lengths, for a few ratios and an expensive objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from counterpoise.records import Progress
from counterpoise.statistics.bootstrap import Array

Evaluate = Callable[[Array], tuple[float, Array]]


@dataclass(frozen=True)
class SearchResult:
    """Where a search ended.

    Attributes:
        ratios: one per block.
        value: the objective there, in nats per response token.
        trace: the objective at each pass, in order; one pass is one forward and backward over the proxy set.
        converged: False when `max_passes` ended it.
    """

    ratios: tuple[float, ...]
    value: float
    trace: tuple[float, ...]
    converged: bool

    @property
    def passes(self) -> int:
        """Forward and backward passes over the proxy set."""
        return len(self.trace)


def spectral_descent(
    evaluate: Evaluate,
    start: Array,
    onto: Callable[[Array], Array],
    weights: Array,
    *,
    max_passes: int,
    tolerance: float,
    first_move: float = 0.4,
    progress: Progress | None = None,
) -> SearchResult:
    """Projected spectral gradient in the metric of `weights` (Birgin, Martinez and Raydan 2000), monotone.

    Made for few variables and a costly function whose gradient comes with it: the first step moves the furthest ratio
    by `first_move`, later ones take the Barzilai-Borwein length, and a step that does not descend is shortened by the
    cubic through both values and slopes. The best point seen is returned.
    """
    trace: list[float] = []

    def traced(ratios: Array) -> tuple[float, Array]:
        found = evaluate(ratios)
        trace.append(found[0])
        if progress is not None:
            progress(len(trace), max_passes)
        return found

    x, (value, gradient) = start, traced(start)
    length = _length_of(first_move, x, gradient / weights, onto)
    if length is None:
        return SearchResult(tuple(map(float, x)), value, tuple(trace), True)
    converged = False
    while len(trace) < max_passes:
        direction = onto(x - length * gradient / weights) - x
        slope = float(gradient @ direction)
        if -slope < tolerance:
            converged = True
            break
        share = 1.0
        while True:
            trial = onto(x + share * direction)
            trial_value, trial_gradient = traced(trial)
            if trial_value <= value + 1e-4 * share * slope or len(trace) >= max_passes:
                break
            share *= _cubic_share(value, share * slope, trial_value, share * float(trial_gradient @ direction))
        if not trial_value < value:  # NaN is no progress
            break
        moved, bent = trial - x, trial_gradient - gradient
        curvature = float(moved @ bent)
        metric = float(moved @ (weights * moved))
        length = metric / curvature if curvature > 1e-12 * metric else 4 * length
        x, value, gradient = trial, trial_value, trial_gradient
    return SearchResult(tuple(map(float, x)), value, tuple(trace), converged)


def _length_of(move: float, x: Array, downhill: Array, onto: Callable[[Array], Array]) -> float | None:
    """The step length that moves the furthest ratio by about `move` after projection; None when nothing can move.

    Most of the gradient is common to all ratios ("keep more of everything") and the mean constraint takes it away: what
    is left may be a hundredth of it, and a length found from the whole gradient would barely move.
    """
    length = move / max(float(np.abs(downhill).max()), 1e-30)
    for _ in range(4):
        moved = float(np.abs(onto(x - length * downhill) - x).max())
        if moved == 0.0:
            return None
        if moved >= move / 2:
            break
        length *= move / moved
    return length


def _cubic_share(value: float, slope: float, end_value: float, end_slope: float) -> float:
    """Where in (0, 1) the cubic with these values and slopes at 0 and 1 is least, kept within [0.1, 0.7].

    A half where the end is infinite: out of reach of the objective.
    """
    if not np.isfinite(end_value):
        return 0.5
    a = slope + end_slope - 2 * (end_value - value)
    b = 3 * (end_value - value) - 2 * slope - end_slope
    disc = b * b - 3 * a * slope
    if disc < 0:
        return 0.5
    bottom = b + np.sqrt(disc)
    share = -slope / bottom if bottom > 0 else 0.5
    return float(np.clip(share, 0.1, 0.7))
