"""Intervals and paired comparisons by resampling items: plain arrays, no model.

A measurement is an array of per-item sufficient statistics, shape (items, d), and the name of the aggregate that turns
their sum into a score: "mean" (d = 1), "ratio" (d = 2, sum of the first over sum of the second, for losses per token) or
"bleu" (corpus BLEU). Resampling items is then one matrix product, whatever the score. "mean by 60:2 25:1" is the weighted
mean of the scores of the first 60 items and of the other 25, which are resampled apart: see `weighted`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
RESAMPLES = 2000
NORMAL = 1.959964  # standard errors to each end of a 95 % interval
FLOOR = 0.2  # of the sample's variance: least that of a resample
MOST = 4096  # items, or groups of items, that are resampled
_BY, _APART = " by ", 1000  # between an aggregate and its tasks; between their seeds


class Interval(NamedTuple):
    """A score, its 95 % interval and its standard error."""

    value: float
    low: float
    high: float
    standard_error: float


class Difference(NamedTuple):
    """A difference, its 95 % interval and its two-sided p."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Studentised:
    """A value, resampled over items, with the error of each resample, so that skewed and few items are covered.

    The bootstrap-t (Efron 1979; Hall 1988): t = (resampled - value) / its error, whose quantiles replace the normal's.
    Errors are the delta method's in each resample. A resample of few items may be one of them over and over: without
    variance its t would be infinite. So none counts as having less than a fifth of the sample's variance, and one nth of
    the sample's is added to every resample's and to the value's own (experiments/statistics has what that covers).

    Attributes:
        drawn, errors: shape (resamples,).
        error: the standard error of `value` that belongs to them.
    """

    value: float
    drawn: Array
    errors: Array
    error: float

    @classmethod
    def of(cls, sides: Sequence[tuple[Array, int]], aggregate: str, weights: Array) -> Studentised:
        """The sum of sign * score over `sides`, each statistics of the same items and its sign."""
        joined = np.hstack([s for s, _ in sides])
        one, two = np.triu_indices(joined.shape[1])
        products = joined[:, one] * joined[:, two] * np.where(one == two, 1.0, 2.0)

        def seen(sums: Array, squares: Array) -> tuple[Array, Array]:
            """The value at these sums, and its variance: scores do not change when all sums grow alike (Euler)."""
            each = np.split(sums, len(sides), axis=1)
            value = sum(sign * _aggregate(aggregate)(part) for part, (_, sign) in zip(each, sides, strict=True))
            slopes = [sign * _gradient(aggregate, part) for part, (_, sign) in zip(each, sides, strict=True)]
            slope = np.hstack(slopes)
            return np.asarray(value), np.maximum((slope[:, one] * slope[:, two] * squares).sum(1), 0.0)

        value, variance = seen(joined.sum(0)[None], products.sum(0)[None])
        drawn, variances = seen(weights @ joined, weights @ products)
        more = variance / len(joined)
        errors = np.sqrt(np.maximum(variances, FLOOR * variance) + more)
        return cls(float(value[0]), drawn, errors, float(np.sqrt(variance + more)[0]))

    @classmethod
    def mean(cls, parts: Sequence[Studentised], scales: Sequence[float]) -> Studentised:
        """The mean of values of independent items, each divided by its scale."""
        return cls.total(parts, [1 / (s * len(scales)) for s in scales])

    @classmethod
    def total(cls, parts: Sequence[Studentised], weights: Sequence[float]) -> Studentised:
        """The weighted sum of values of independent items: their errors add up in squares."""
        rows = [
            (w * p.value, w * p.drawn, (w * p.errors) ** 2, (w * p.error) ** 2)
            for p, w in zip(parts, weights, strict=True)
        ]
        value, drawn, errors, error = (sum(column) for column in zip(*rows, strict=True))
        return cls(float(value), drawn, np.sqrt(errors), float(np.sqrt(error)))

    @property
    def t(self) -> Array:
        """The studentised resamples, without those that had nothing to divide by; shape (at most resamples,)."""
        return _there((self.drawn - self.value) / np.where(self.errors > 0, self.errors, np.inf))

    def interval(self) -> Interval:
        """The value with its 95 % interval and its standard error."""
        low, high = np.quantile(self.t, [0.025, 0.975])
        deviation = float(_there(self.drawn).std(ddof=1))
        return Interval(
            self.value, self.value - float(high) * self.error, self.value - float(low) * self.error, deviation
        )

    def difference(self) -> Difference:
        """The value as a difference: its interval, and its p, below 0.05 just when the interval leaves 0 out.

        p is twice the smaller share of resamples whose t is as far out as that of 0, with one added to both counts so
        that it is never 0.
        """
        (_, low, high, _), t = self.interval(), self.t
        if self.error == 0:
            return Difference(self.value, low, high, 1.0 if self.value == 0 else 2 / (len(t) + 1))
        own = self.value / self.error
        tail = min(int((t <= own).sum()), int((t >= own).sum()))
        return Difference(self.value, low, high, min(1.0, 2 * (tail + 1) / (len(t) + 1)))


def interval(statistics: ArrayLike, aggregate: str, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The score with its 95 % interval over the items, see `Studentised`.

    Args:
        statistics: shape (items, d).
    """
    return scored(statistics, aggregate, seed=seed, resamples=resamples).interval()


def scored(statistics: ArrayLike, aggregate: str, *, seed: int = 0, resamples: int = RESAMPLES) -> Studentised:
    """The score of these items, resampled; shape (items, d)."""
    return _studentised([(np.asarray(statistics, dtype=np.float64), 1)], aggregate, seed, resamples)


def paired_difference(a: ArrayLike, b: ArrayLike, aggregate: str, *, resamples: int = RESAMPLES) -> Difference:
    """score(a) - score(b) on the same items, with its 95 % interval and two-sided p by paired resampling."""
    return paired(a, b, aggregate, resamples=resamples).difference()


def paired(a: ArrayLike, b: ArrayLike, aggregate: str, *, seed: int = 0, resamples: int = RESAMPLES) -> Studentised:
    """score(a) - score(b), the same items drawn for both."""
    first, second = alike(a, b)
    return _studentised([(first, 1), (second, -1)], aggregate, seed, resamples)


def weighted(aggregate: str, strata: Sequence[tuple[int, float]]) -> str:
    """The aggregate of several tasks: of each its number of items, in their order, and its weight.

    >>> weighted("mean", [(60, 2), (25, 1)])
    'mean by 60:2 25:1'
    """
    return f"{aggregate}{_BY}{' '.join(f'{items}:{weight}' for items, weight in strata)}"


def of_groups(aggregate: str, groups: Sequence[str]) -> str:
    """The aggregate of `clustered` statistics: each task's number of groups stands for that of its items.

    Args:
        groups: of each item; those of one task sort before those of the next.

    >>> of_groups("mean by 3:2 2:1", ["1 a", "1 a", "1 b", "2 a", "2 b"])
    'mean by 2:2 2:1'
    """
    base, _, listed = aggregate.partition(_BY)
    counts = [len(set(groups[cut])) for cut, _ in _strata(aggregate, len(groups))[1]]
    weights = [one.partition(":")[2] for one in listed.split()]
    return f"{base}{_BY}{' '.join(map(':'.join, zip(map(str, counts), weights, strict=True)))}" if listed else base


def _strata(aggregate: str, items: int) -> tuple[str, list[tuple[slice, float]]]:
    """The aggregate of each task, and which items are its own with its share in the mean."""
    base, _, listed = aggregate.partition(_BY)
    if not listed:
        return base, [(slice(0, items), 1.0)]
    pairs = [one.partition(":") for one in listed.split()]
    fits = all(n.isdecimal() and int(n) and w.replace(".", "", 1).isdecimal() for n, _, w in pairs)
    if not fits or sum(int(n) for n, _, _ in pairs) != items or not any(float(w) for _, _, w in pairs):
        raise ValueError(f"aggregate {aggregate[:80]!r}: expected ITEMS:WEIGHT of each task, of {items} items together")
    sizes, weights = [int(n) for n, _, _ in pairs], [float(w) for _, _, w in pairs]
    ends = np.cumsum(sizes).tolist()
    return base, [(slice(end - n, end), w / sum(weights)) for end, n, w in zip(ends, sizes, weights, strict=True)]


def _studentised(sides: Sequence[tuple[Array, int]], aggregate: str, seed: int, resamples: int) -> Studentised:
    base, strata = _strata(aggregate, len(sides[0][0]))
    made = []
    for number, (cut, _) in enumerate(strata):
        own = [(_statistics(s[cut], len(strata)), sign) for s, sign in sides]
        made.append(Studentised.of(own, base, bootstrap_weights(len(own[0][0]), resamples, seed + _APART * number)))
    return made[0] if len(made) == 1 else Studentised.total(made, [w for _, w in strata])


def resampled_difference(value: float, drawn: Array) -> Difference:
    """A difference with the percentile interval and the p that its resamples, shape (resamples,), give it.

    For what has no influence of single items: areas under fronts, points at equal reward, means over tasks. p is twice the
    smaller share of resampled differences on one side of 0, with one added to both counts.
    """
    drawn = _there(drawn)
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Difference(value, float(low), float(high), min(1.0, 2 * (tail + 1) / (len(drawn) + 1)))


def over_runs(values: Sequence[float]) -> Difference | None:
    """The mean of independent runs' differences, with Student's t: what another seed of the training would give.

    An interval over items speaks of the runs that there are; this one of runs like them, and is wide where they are few.
    None with fewer than two.
    """
    from scipy.special import stdtr, stdtrit

    found, n = np.asarray(values, dtype=np.float64), len(values)
    if n < 2:
        return None
    value, error = float(found.mean()), float(found.std(ddof=1)) / n**0.5
    half = error * float(stdtrit(n - 1, 0.975))
    p = 2 * float(stdtr(n - 1, -abs(value) / error)) if error else float(value == 0)
    return Difference(value, value - half, value + half, p)


def replicates(statistics: ArrayLike, aggregate: str, *, seed: int = 0, resamples: int = RESAMPLES) -> Array:
    """Resampled scores, shape (resamples,); arrays of as many items are drawn alike."""
    s = np.asarray(statistics, dtype=np.float64)
    base, strata = _strata(aggregate, len(s))
    found = np.zeros(resamples)
    for number, (cut, share) in enumerate(strata):
        own = _statistics(s[cut], len(strata))
        weights = bootstrap_weights(len(own), resamples, seed + _APART * number)
        found += share * _aggregate(base)(weights @ own)
    return found


def paired_replicates(
    a: ArrayLike, b: ArrayLike, aggregate: str, *, seed: int = 0, resamples: int = RESAMPLES
) -> Array:
    """Resampled score(a) - score(b), the same items drawn for both; shape (resamples,)."""
    first, second = (replicates(s, aggregate, seed=seed, resamples=resamples) for s in alike(a, b))
    return first - second


def grouped(statistics: ArrayLike, most: int) -> Array:
    """The statistics of at most `most` random groups of items, the same groups for every array of as many items.

    All scores are functions of sums, so that groups of independent items spread as the items do, in bounded memory.

    Args:
        statistics: shape (items, d); a mean (d = 1) gets its counts as second statistic.
    """
    s = np.asarray(statistics, dtype=np.float64)
    return s if len(s) <= most else clustered(s, np.random.default_rng(len(s)).permutation(len(s)) % most)


def score(statistics: ArrayLike, aggregate: str) -> float:
    """The score of all items."""
    s = np.asarray(statistics, dtype=np.float64)
    base, strata = _strata(aggregate, len(s))
    return float(sum(w * _aggregate(base)(_statistics(s[cut]).sum(0, keepdims=True))[0] for cut, w in strata))


@lru_cache(maxsize=32)
def bootstrap_weights(items: int, resamples: int, seed: int) -> Array:
    """How often each item is drawn in each resample, shape (resamples, items)."""
    weights = np.random.default_rng([seed, items]).multinomial(items, np.full(items, 1 / items), size=resamples)
    return weights.astype(np.float64)


def alike(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    """Both sides as arrays; a ValueError where they are not of the same items."""
    if np.shape(a) != np.shape(b):  # before very many items become groups
        raise ValueError(f"expected the same items on both sides, found shapes {np.shape(a)} and {np.shape(b)}")
    return np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)


def _aggregate(name: str) -> Callable[[Array], Array]:
    if name not in ("mean", "ratio", "bleu"):
        raise ValueError(f"aggregate: expected mean, ratio or bleu, found {name!r}")
    return _bleu if name == "bleu" else lambda sums: divided(sums[:, 0], sums[:, 1])


def divided(a: Array, b: Array) -> Array:
    """a / b, and nan where there is nothing to divide by: in a resample of few items, which then counts nowhere."""
    return np.asarray(a / np.where(b == 0, np.nan, b))


def _there(drawn: Array) -> Array:
    return drawn[~np.isnan(drawn)]


def _gradient(name: str, sums: Array) -> Array:
    """How a score changes with each of its sums, shape (m, d)."""
    if name != "bleu":
        return np.stack([divided(np.ones(len(sums)), sums[:, 1]), divided(-sums[:, 0], sums[:, 1] ** 2)], axis=1)
    lengths, references, hits, totals = sums[:, [0]], sums[:, [1]], sums[:, 2:6], sums[:, 6:10]
    short = np.where((references > lengths) & (lengths > 0), 1.0, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = np.hstack([short * references / lengths**2, -short / lengths, 0.25 / hits, -0.25 / totals])
    return _bleu(sums)[:, None] * np.where(np.isfinite(slopes), slopes, 0.0)


def _bleu(sums: Array) -> Array:
    """Corpus BLEU (0 to 100, exponential smoothing) from (hypothesis length, reference length, 4 hits, 4 totals)."""
    lengths, references, hits, totals = sums[:, 0], sums[:, 1], sums[:, 2:6], sums[:, 6:10]
    zeros = np.cumsum(hits == 0, axis=1)
    smoothed = np.where(hits > 0, hits, np.exp2(-zeros))
    defined = (totals > 0).all(1) & (hits[:, 0] > 0)
    logs = np.log(smoothed / np.maximum(totals, 1)).mean(1)
    brevity = np.minimum(0.0, 1 - references / np.maximum(lengths, 1))
    return np.where(defined, 100 * np.exp(logs + brevity), 0.0)


def _statistics(statistics: ArrayLike, tasks: int = 1) -> Array:
    s = np.asarray(statistics, dtype=np.float64)
    if s.ndim != 2 or len(s) == 0 or not np.isfinite(s).all():
        raise ValueError(
            f"expected finite statistics of shape (items, d) with at least one item, found shape {s.shape}"
        )
    # The mean is the ratio whose second statistic is 1 for every item.
    return grouped(np.hstack([s, np.ones_like(s)]) if s.shape[1] == 1 else s, max(MOST // tasks, 32))


def clustered(statistics: ArrayLike, groups: ArrayLike) -> Array:
    """Sums of the statistics over the items of each group: what is resampled where items are not independent.

    Args:
        statistics: shape (items, d); a mean (d = 1) gets its counts as second statistic.
        groups: the group of each item, shape (items,).
    """
    s = np.asarray(statistics, dtype=np.float64)
    s = np.hstack([s, np.ones_like(s)]) if s.shape[1] == 1 else s
    _, of = np.unique(np.asarray(groups), return_inverse=True)
    return np.stack([np.bincount(of, column) for column in s.T], axis=1)
