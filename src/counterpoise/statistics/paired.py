"""Two models on the same items, item by item: flips between right and wrong, calibration, p values of many tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from counterpoise.statistics.bootstrap import (
    RESAMPLES,
    Array,
    Difference,
    Studentised,
    bootstrap_weights,
    grouped,
    interval,
    paired,
    paired_difference,
    resampled_difference,
    scored,
)

MOST = 1000  # groups of items that are resampled
BINS = 10
_NORMAL = 1.959964


def _grouped_alike(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    if np.shape(a) != np.shape(b):  # as groups they would be as many
        raise ValueError(f"expected the same items on both sides, found shapes {np.shape(a)} and {np.shape(b)}")
    return grouped(a, MOST), grouped(b, MOST)


def tax_of(a: ArrayLike, b: ArrayLike, aggregate: str) -> Difference:
    """score(a) - score(b) of the same items by paired bootstrap.

    2,000 resamples cannot resolve a p below 0.001, which no adjustment for many tasks would leave significant: where the
    bootstrap's p is at that floor, Student's t with the standard error gives it, if it is smaller.
    """
    first, second = _grouped_alike(a, b)
    return _resolved(paired(first, second, aggregate), len(first))


def _resolved(found: Studentised, items: int) -> Difference:
    """A difference whose p is not held up by the number of its resamples; see `tax_of`."""
    from scipy.special import stdtr

    said = found.difference()
    if said.p > 2 / (len(found.drawn) + 1) or found.error == 0 or items < 3:
        return said
    return said._replace(p=min(said.p, 2 * float(stdtr(items - 1, -abs(found.value) / found.error))))


class Resampled(NamedTuple):
    """Two scores of the same items and their difference (a, b, a - b), resampled alike."""

    scores: tuple[Studentised, Studentised, Studentised]
    items: int


def resampled(a: ArrayLike, b: ArrayLike, aggregate: str, seed: int) -> Resampled:
    """What `stratified` needs of one task; tasks of as many items need seeds of their own, or are drawn alike."""
    first, second = _grouped_alike(a, b)
    before, after = (scored(side, aggregate, seed=seed) for side in (first, second))
    return Resampled((before, after, paired(first, second, aggregate, seed=seed)), len(first))


def stratified(tasks: Sequence[Resampled], weights: Sequence[float]) -> list[Difference]:
    """The weighted mean over tasks of a, of b and of a - b, items resampled within each task; studentised.

    Args:
        weights: of each task; they sum to 1.
    """
    items = sum(t.items for t in tasks)
    columns = zip(*(t.scores for t in tasks), strict=True)
    return [_resolved(Studentised.total(column, weights), items) for column in columns]


def flips(lost: int, won: int, items: int) -> dict[str, Any]:
    """Shares (in percent) of the items that went from right to wrong ("lost") and from wrong to right ("won").

    Their 95 % intervals are Wilson's (1927), p is McNemar's exact one (1947): of the items that flipped, half should
    have gone each way.
    """
    from scipy.special import bdtr

    p = min(1.0, 2 * float(bdtr(min(lost, won), lost + won, 0.5))) if lost + won else 1.0
    return {"lost": _share(lost, items), "won": _share(won, items), "p": p}


def calibration(a: ArrayLike, b: ArrayLike) -> dict[str, dict[str, Any]]:
    """Expected calibration error and Brier score of two models on the same items, in percent, lower is better.

    ECE (Guo et al. 2017, eq. 3) over ten bins of equal width; Brier (1950) sums the squares over the choices. Resampling
    adds to an ECE, which is a sum of absolute values: its intervals are reflected at the value (basic bootstrap). That
    undoes part of it: where one model is calibrated perfectly, the worst case, the rise is covered in .82 at 60 items, .89
    at 200 and .85 at 1,000 (percentiles: .41, .31 and .39; 150 simulations each). Brier scores have no such trouble.

    Args:
        a, b: shape (items, 3): confidence in the likeliest choice, whether it is right, Brier score.

    Returns:
        "ece", "brier" -> pre, post, and rise (post minus pre).
    """
    both = [np.asarray(x, dtype=np.float64) for x in (a, b)]
    brier = [grouped(100 * x[:, 2:], MOST) for x in both]
    scores = [
        {"value": v, "low": max(0.0, low), "high": high} for v, low, high, _ in (interval(x, "mean") for x in brier)
    ]
    rise = paired_difference(brier[1], brier[0], "mean")._asdict()
    found = {"brier": {"pre": scores[0], "post": scores[1], "rise": rise}}
    errors = [_ece(x) for x in both]
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


def _ece(items: Array) -> tuple[float, Array]:
    """The error, and its resamples."""
    of = np.minimum((items[:, 0] * BINS).astype(int), BINS - 1)
    gaps = np.zeros((len(items), BINS + 1))
    gaps[np.arange(len(items)), of] = 100 * (items[:, 0] - items[:, 1])
    gaps[:, BINS] = 1.0
    sums = grouped(gaps, MOST)

    def error(s: Array) -> Array:
        return np.asarray(np.abs(s[:, :BINS]).sum(1) / s[:, BINS])

    return float(error(sums.sum(0, keepdims=True))[0]), error(bootstrap_weights(len(sums), RESAMPLES, 0) @ sums)


def _share(count: int, items: int) -> dict[str, float]:
    share, z2 = count / items, _NORMAL**2
    middle = (share + z2 / (2 * items)) / (1 + z2 / items)
    half = _NORMAL / (1 + z2 / items) * math.sqrt(share * (1 - share) / items + z2 / (4 * items**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return {"value": 100 * count / items, "low": 100 * low * (count > 0), "high": 100 * high, "count": count}
