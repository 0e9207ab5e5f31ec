"""Two models on the same items, item by item: flips between right and wrong, calibration, p values of many tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from counterpoise.statistics.bootstrap import (
    NORMAL,
    RESAMPLES,
    Array,
    Difference,
    Studentised,
    alike,
    bootstrap_weights,
    clustered,
    grouped,
    interval,
    paired,
    paired_difference,
    resampled_difference,
    scored,
)

MOST = 1000  # groups of items that are resampled
BINS = 10


class Resampled(NamedTuple):
    """Two scores of the same items and their difference (a, b, a - b), resampled alike."""

    scores: tuple[Studentised, Studentised, Studentised]
    items: int

    def tax(self) -> Difference:
        """a - b by paired bootstrap, see `_resolved`."""
        return _resolved(self.scores[2], self.items)


def resampled(a: ArrayLike, b: ArrayLike, aggregate: str, seed: int = 0) -> Resampled:
    """Both sides of one task; tasks that go into `stratified` need seeds of their own where they have as many items."""
    first, second = (grouped(side, MOST) for side in alike(a, b))  # as groups they would be as many
    before, after = (scored(side, aggregate, seed=seed) for side in (first, second))
    return Resampled((before, after, paired(first, second, aggregate, seed=seed)), len(first))


def _resolved(found: Studentised, items: int) -> Difference:
    """A difference whose p is not held up by the number of its resamples.

    2,000 resamples cannot resolve a p below 0.001, which no adjustment for many tasks would leave significant: where the
    bootstrap's p is at that floor, Student's t with the standard error gives it, if it is smaller.
    """
    from scipy.special import stdtr

    said = found.difference()
    if said.p > 2 / (len(found.t) + 1) or found.error == 0 or items < 3:
        return said
    return said._replace(p=min(said.p, 2 * float(stdtr(items - 1, -abs(found.value) / found.error))))


def stratified(tasks: Sequence[Resampled], weights: Sequence[float]) -> list[Difference]:
    """The weighted mean over tasks of a, of b and of a - b, items resampled within each task; studentised.

    Args:
        weights: of each task; they sum to 1.
    """
    items = sum(t.items for t in tasks)
    columns = zip(*(t.scores for t in tasks), strict=True)
    return [_resolved(Studentised.total(column, weights), items) for column in columns]


def cells(before: ArrayLike, after: ArrayLike) -> Array:
    """Whether each item is right in both, lost, won or wrong in both: shape (items, 4), a single 1 in each row."""
    a, b = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    return np.stack([a & b, a & ~b, ~a & b, ~a & ~b], axis=1).astype(np.float64)


def flips(counts: ArrayLike, chance: ArrayLike = 0.0, together: ArrayLike = ()) -> dict[str, Any]:
    """Shares (in percent) of the items that went from right to wrong ("lost") and from wrong to right ("won").

    Less what guessing alone would flip, (1 - a) (1 - b) / (k - 1), where a and b are right of k choices and each model knows
    an answer or guesses it, on its own (Harmon et al. 2025, arXiv 2510.17776): never below 0. Models that guess alike flip
    less by chance than that, so what was "seen" stands beside it. Intervals (95 %) are Wilson's (1927), stretched by what
    the subtraction adds to the standard error; items that go together count for as few as they spread like (the effective
    sample size of Kish 1965). p is McNemar's exact one (1947): of the items that flipped, or of the groups in which more
    flipped one way, half should have gone each way; chance is the same both ways.

    Args:
        counts: numbers of items right in both, lost, won, wrong in both: shape (4,), or (tasks, 4) of a group.
        chance: the share that guessing gets right, 1 / k (in the mean, where items differ); 0 where nothing can be guessed.
            One number, or one a task.
        together: the same counts of every group of items, shape (groups, 4); () where each item is by itself.
    """
    from scipy.special import bdtr

    n = np.atleast_2d(np.asarray(counts, dtype=np.float64))
    size = n.sum(1)
    k = np.broadcast_to(np.asarray(chance, dtype=np.float64), size.shape)
    odds = np.where(k < 1, k / np.where(k < 1, 1 - k, 1), 0.0)
    _, lost, won, _ = totals = [int(count) for count in n.sum(0)]
    lucky = 100 * float((odds * (n[:, 2] + n[:, 3]) * (n[:, 1] + n[:, 3]) / size).sum() / n.sum())
    p = (n + 1) / (n + 1).sum(1, keepdims=True)  # no cell without variance
    before, after = p[:, 2] + p[:, 3], p[:, 1] + p[:, 3]
    slope = -odds[:, None] * np.stack([0 * before, before, after, before + after], 1)
    groups = np.asarray(together, dtype=np.float64)
    ways = np.sign(groups[:, 1] - groups[:, 2]) if len(groups) else np.repeat([1, -1], [lost, won])
    down, up = int((ways > 0).sum()), int((ways < 0).sum())
    exact = min(1.0, 2 * float(bdtr(min(down, up), down + up, 0.5))) if down + up else 1.0
    found: dict[str, Any] = {"cells": totals, "by_chance": lucky, "p": exact}
    for name, at in (("lost", 1), ("won", 2)):
        unit = np.eye(4)[at]
        spread = [(size * ((g**2 * p).sum(1) - (g * p).sum(1) ** 2)).sum() for g in (slope + unit, unit[None])]
        independent = _effective(groups, at) if len(groups) else float(sum(totals))
        found[name] = _share(totals[at], sum(totals), lucky, math.sqrt(spread[0] / spread[1]), independent)
    return found


def _effective(groups: Array, at: int) -> float:
    """As many independent items as give a share its variance over groups, at most as many as there are."""
    size, count = groups.sum(1), len(groups)
    share = groups[:, at].sum() / size.sum()
    spread = ((groups[:, at] - share * size) ** 2).sum() * count / max(count - 1, 1)
    alone = share * (1 - share) * size.sum() ** 2
    return float(min(size.sum(), alone / spread)) if spread else float(count)


def choice_calibration(logs: Sequence[float], gold: int) -> tuple[float, float, float]:
    """What `calibration` takes of an item, from its choices' log-likelihoods: confidence, whether right, Brier score.

    >>> [round(x, 3) for x in choice_calibration([0.0, -math.log(3)], 0)]
    [0.75, 1.0, 0.125]
    """
    best = max(range(len(logs)), key=logs.__getitem__)
    shares = [math.exp(v - logs[best]) for v in logs]
    whole = sum(shares)
    brier = sum((v / whole - (i == gold)) ** 2 for i, v in enumerate(shares))
    return shares[best] / whole, float(best == gold), brier


def calibration(a: ArrayLike, b: ArrayLike, groups: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Expected calibration error and Brier score of two models on the same items, in percent, lower is better.

    ECE (Guo et al. 2017, eq. 3) over ten bins of equal width; Brier (1950) sums the squares over the choices. Resampling
    adds to an ECE, which is a sum of absolute values: its intervals are reflected at the value (basic bootstrap). That
    undoes part of it: where one model is calibrated perfectly, the worst case, the rise is covered in .82 at 60 items, .89
    at 200 and .85 at 1,000 (percentiles: .41, .31 and .39; 150 simulations each). Brier scores have no such trouble.

    Args:
        a, b: shape (items, 3): confidence in the likeliest choice, whether it is right, Brier score.
        groups: the group of each item, resampled whole; () where each is by itself.

    Returns:
        "ece", "brier" -> pre, post, and rise (post minus pre).
    """
    both = [np.asarray(x, dtype=np.float64) for x in (a, b)]
    brier = [_resampled_as(100 * x[:, 2:], groups) for x in both]
    scores = [
        {"value": v, "low": max(0.0, low), "high": high} for v, low, high, _ in (interval(x, "mean") for x in brier)
    ]
    rise = paired_difference(brier[1], brier[0], "mean")._asdict()
    found = {"brier": {"pre": scores[0], "post": scores[1], "rise": rise}}
    errors = [_ece(x, groups) for x in both]
    sides = {}
    for name, (value, drawn) in zip(("pre", "post"), errors, strict=True):
        low, high = np.quantile(2 * value - drawn, [0.025, 0.975])
        sides[name] = {"value": value, "low": max(0.0, float(low)), "high": float(high)}
    value = errors[1][0] - errors[0][0]
    rise = resampled_difference(value, 2 * value - (errors[1][1] - errors[0][1]))._asdict()
    return {"ece": {**sides, "rise": rise}, **found}


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p values: the share of tests that are wrongly called is bounded for all together.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def _resampled_as(statistics: Array, groups: Sequence[str]) -> Array:
    return grouped(clustered(statistics, groups) if groups else statistics, MOST)


def _ece(items: Array, groups: Sequence[str]) -> tuple[float, Array]:
    """The error, and its resamples."""
    of = np.minimum((items[:, 0] * BINS).astype(int), BINS - 1)
    gaps = np.zeros((len(items), BINS + 1))
    gaps[np.arange(len(items)), of] = 100 * (items[:, 0] - items[:, 1])
    gaps[:, BINS] = 1.0
    sums = _resampled_as(gaps, groups)

    def error(s: Array) -> Array:
        return np.asarray(np.abs(s[:, :BINS]).sum(1) / s[:, BINS])

    return float(error(sums.sum(0, keepdims=True))[0]), error(bootstrap_weights(len(sums), RESAMPLES, 0) @ sums)


def _share(count: int, items: int, lucky: float, stretch: float, independent: float) -> dict[str, float]:
    share, z2 = count / items, NORMAL**2
    middle = (share + z2 / (2 * independent)) / (1 + z2 / independent)
    half = NORMAL / (1 + z2 / independent) * math.sqrt(share * (1 - share) / independent + z2 / (4 * independent**2))
    low, high = max(0.0, middle - half) * (count > 0), min(1.0, middle + half)
    value = 100 * count / items - lucky
    ends = (value, value - 100 * stretch * (share - low), value + 100 * stretch * (high - share))
    value, low, high = (min(100.0, max(0.0, end)) for end in ends)
    return {"value": value, "low": low, "high": high, "count": count, "seen": 100 * count / items}
