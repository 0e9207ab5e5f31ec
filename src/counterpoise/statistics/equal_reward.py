"""How much more a method keeps than a reference: at the same reward, and over a whole front. Plain arrays, no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from counterpoise.statistics.bootstrap import (
    RESAMPLES,
    Array,
    paired_replicates,
    resampled_difference,
    score,
)
from counterpoise.statistics.front import areas


class Statistics(NamedTuple):
    """Per-item statistics of one measurement, shape (items, d), and how they become a score, as `bootstrap` takes them."""

    items: ArrayLike
    aggregate: str = "mean"


class ModelStatistics(NamedTuple):
    """One model: its reward, and the abilities whose mean is compared; the same items in all that are compared."""

    reward: Statistics
    abilities: tuple[Statistics, ...]


class PointAndCurve(NamedTuple):
    """A point and the reference curve of the same training run, in the order of its ratio (PRE, MA 0.2, ..., POST)."""

    point: ModelStatistics
    curve: Sequence[ModelStatistics]


class Matched(NamedTuple):
    """What a point keeps beyond the reference at equal reward, averaged over runs.

    Attributes:
        value, low, high, p: the difference, its 95 % interval over items for these runs, and its two-sided p.
        by_run: the difference in each run; None where the reference does not reach the point's reward.
        outside: share of resamples (of the runs counted) in which the reference did not reach it and its nearest end
            was taken.
        seeds: the mean in each training run that has one: what `bootstrap.over_runs` takes.
    """

    value: float
    low: float
    high: float
    p: float
    by_run: tuple[float | None, ...]
    outside: float
    seeds: tuple[float, ...] = ()


def reward_matched(
    runs: Sequence[PointAndCurve], scales: Sequence[float] = (1.0,), *, resamples: int = RESAMPLES
) -> Matched | None:
    """Ability of a point minus that of the reference curve at the point's reward, by paired bootstrap, pooled over runs.

    The curve is drawn as straight lines between its points, and read where it has the point's reward; if more than once,
    where it keeps most. Ability is the mean over abilities of score / scale: with the unit of each ability's loss as its
    scale it is retention up to a constant that cancels. Prompts and items are resampled as pairs: the same ones for the point and
    for every point of the curve, in every run, so that what all share cancels. The runs themselves are not resampled: the
    interval speaks of these, and `by_run` shows how far they differ.

    Args:
        runs: one per training seed.
        scales: one per ability, positive.

    Returns:
        None when no run's reference reaches the point's reward.

    Raises:
        ValueError: other items on one side.
    """
    by_run: list[float | None] = []
    drawn, outside = [], []
    for run in runs:
        x, y = _seen_from_point(run, scales)
        found, inside = meeting(x[None], y[None])
        by_run.append(float(-found[0]) if inside[0] else None)
        if inside[0]:
            values, within = meeting(*_resampled(run, scales, resamples))
            drawn.append(-values)
            outside.append(1.0 - float(within.mean()))
    if not drawn:
        return None
    seen = tuple(v for v in by_run if v is not None)
    said = resampled_difference(float(np.mean(seen)), np.mean(drawn, axis=0))
    return Matched(*said, tuple(by_run), float(np.mean(outside)), seen)


class Fronts(NamedTuple):
    """Two methods' points of one training run, and PRE and POST, which belong to both fronts."""

    pre: ModelStatistics
    post: ModelStatistics
    ours: Sequence[ModelStatistics]
    theirs: Sequence[ModelStatistics]


def hypervolume_gain(runs: Sequence[Fronts], scales: Sequence[float] = (1.0,)) -> Matched | None:
    """Area under our front minus that under theirs, by paired bootstrap, pooled over runs.

    Areas lie between PRE's reward and POST's ability, in units of the rectangle that PRE and POST span, as elsewhere. In a
    resample the corner moves with PRE and POST and the unit stays. More points make a larger area: of theirs as many as
    ours are taken, in the mean over all such choices.

    Returns:
        None where POST is not above PRE in reward and below it in ability, or theirs are fewer points than ours, in any run.
    """
    values: list[float] = []
    drawn: list[Array] = []
    for run in runs:
        seen = PointAndCurve(run.pre, [run.pre, run.post, *run.ours, *run.theirs])
        count = len(run.ours)
        x, y = _seen_from_point(seen, scales)
        span = float(x[1]), float(-y[1])
        if min(span) <= 0 or count > len(run.theirs):
            continue
        gains = []
        for xs, ys in ((x[None], y[None]), _resampled(seen, scales, RESAMPLES)):
            u, v = xs / span[0], (ys - ys[:, [1]]) / span[1]
            u, v = u[:, 2:], v[:, 2:]  # PRE and POST lie on the edges and have no area
            gains.append(areas(u[:, :count], v[:, :count]) - areas(u[:, count:], v[:, count:], of=count))
        values.append(float(gains[0][0]))
        drawn.append(gains[1])
    if not values:
        return None
    found = resampled_difference(float(np.mean(values)), np.mean(drawn, axis=0))
    return Matched(*found, tuple(values), 0.0, tuple(values))


def meeting(x: ArrayLike, y: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    """Where lines through (x_1, y_1), ..., (x_n, y_n) cross x = 0: the largest y there, and whether they do.

    Where they do not, the y of the point nearest to x = 0.

    Args:
        x, y: shape (m, n), n >= 2: m curves at once.

    Returns:
        y and inside, shape (m,).

    >>> meeting([[-1.0, 1.0, 3.0]], [[4.0, 2.0, 0.0]])
    (array([3.]), array([ True]))
    """
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    x0, x1, y0, y1 = xs[:, :-1], xs[:, 1:], ys[:, :-1], ys[:, 1:]
    crosses = (np.minimum(x0, x1) <= 0) & (np.maximum(x0, x1) >= 0)
    run = x1 - x0
    share = np.where(run != 0, -x0 / np.where(run != 0, run, 1.0), 0.0)
    between = (1 - share) * y0 + share * y1
    at = np.where(run != 0, between, np.maximum(y0, y1))  # a line along x = 0 is met at its better end
    best = np.where(crosses, at, -np.inf).max(1)
    inside = np.asarray(crosses.any(axis=1), dtype=np.bool_)
    nearest = np.take_along_axis(ys, np.abs(xs).argmin(1)[:, None], 1)[:, 0]
    return np.where(inside, best, nearest), inside


def _seen_from_point(run: PointAndCurve, scales: Sequence[float]) -> tuple[Array, Array]:
    """The curve's points minus the point: rewards and scaled abilities, shape (n,)."""

    def of(scored: ModelStatistics) -> tuple[float, float]:
        abilities = [score(a.items, a.aggregate) / s for a, s in zip(scored.abilities, scales, strict=True)]
        return score(scored.reward.items, scored.reward.aggregate), float(np.mean(abilities))

    here = of(run.point)
    gaps = np.array([of(c) for c in run.curve]) - here
    return gaps[:, 0], gaps[:, 1]


def _resampled(run: PointAndCurve, scales: Sequence[float], resamples: int) -> tuple[Array, Array]:
    """The same, resampled; shape (resamples, n)."""

    def gap(a: Statistics, b: Statistics, number: int) -> Array:
        return paired_replicates(a.items, b.items, a.aggregate, seed=number, resamples=resamples)

    x, y = [], []
    for other in run.curve:
        x.append(gap(other.reward, run.point.reward, 0))
        pairs = zip(other.abilities, run.point.abilities, scales, strict=True)
        y.append(np.mean([gap(a, b, n) / s for n, (a, b, s) in enumerate(pairs, start=1)], axis=0))
    return np.stack(x, 1), np.stack(y, 1)
