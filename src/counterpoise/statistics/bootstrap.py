"""Intervals and paired comparisons by resampling items: plain arrays, no model.

A measurement is an array of per-item sufficient statistics, shape (items, d), and the name of the aggregate that turns
their sum into a score: "mean" (d = 1), "ratio" (d = 2, sum of the first over sum of the second, for losses per token) or
"bleu" (corpus BLEU). Resampling items is then one matrix product, whatever the score.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
RESAMPLES = 2000


class Interval(NamedTuple):
    """A score, its 95 % percentile bootstrap interval and its standard error."""

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


def interval(statistics: ArrayLike, aggregate: str, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The score with its 95 % percentile bootstrap interval over the items.

    Args:
        statistics: shape (items, d).
    """
    s = _statistics(statistics)
    drawn = _replicates(s, aggregate, seed, resamples)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(score(s, aggregate), float(low), float(high), float(drawn.std(ddof=1)))


def paired_difference(a: ArrayLike, b: ArrayLike, aggregate: str, *, resamples: int = RESAMPLES) -> Difference:
    """score(a) - score(b) on the same items, with its 95 % interval and two-sided p by paired bootstrap.

    p is twice the smaller share of resampled differences on one side of 0, with one added to both counts so that it is
    never 0: below 0.05 just when the interval leaves 0 out (up to that one).
    """
    value = score(a, aggregate) - score(b, aggregate)
    return resampled_difference(value, paired_replicates(a, b, aggregate, resamples=resamples))


def resampled_difference(value: float, drawn: Array) -> Difference:
    """A difference with the interval and the p that its resamples, shape (resamples,), give it."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Difference(value, float(low), float(high), min(1.0, 2 * (tail + 1) / (len(drawn) + 1)))


def paired_replicates(
    a: ArrayLike, b: ArrayLike, aggregate: str, *, seed: int = 0, resamples: int = RESAMPLES
) -> Array:
    """Resampled score(a) - score(b), the same items drawn for both; shape (resamples,)."""
    first, second = _statistics(a), _statistics(b)
    if first.shape != second.shape:
        raise ValueError(f"expected the same items on both sides, found shapes {first.shape} and {second.shape}")
    return _replicates(first, aggregate, seed, resamples) - _replicates(second, aggregate, seed, resamples)


def score(statistics: ArrayLike, aggregate: str) -> float:
    """The score of all items."""
    return float(_aggregate(aggregate)(_statistics(statistics).sum(0, keepdims=True))[0])


@lru_cache(maxsize=32)
def bootstrap_weights(items: int, resamples: int, seed: int) -> Array:
    """How often each item is drawn in each resample, shape (resamples, items)."""
    weights = np.random.default_rng([seed, items]).multinomial(items, np.full(items, 1 / items), size=resamples)
    return weights.astype(np.float64)


def _replicates(s: Array, aggregate: str, seed: int, resamples: int) -> Array:
    return _aggregate(aggregate)(bootstrap_weights(len(s), resamples, seed) @ s)


def _aggregate(name: str) -> Callable[[Array], Array]:
    if name not in ("mean", "ratio", "bleu"):
        raise ValueError(f"aggregate: expected mean, ratio or bleu, found {name!r}")
    return _bleu if name == "bleu" else lambda sums: sums[:, 0] / sums[:, 1]


def _bleu(sums: Array) -> Array:
    """Corpus BLEU (0 to 100, exponential smoothing) from (hypothesis length, reference length, 4 hits, 4 totals)."""
    lengths, references, hits, totals = sums[:, 0], sums[:, 1], sums[:, 2:6], sums[:, 6:10]
    zeros = np.cumsum(hits == 0, axis=1)
    smoothed = np.where(hits > 0, hits, np.exp2(-zeros))
    defined = (totals > 0).all(1) & (hits[:, 0] > 0)
    logs = np.log(smoothed / np.maximum(totals, 1)).mean(1)
    brevity = np.minimum(0.0, 1 - references / np.maximum(lengths, 1))
    return np.where(defined, 100 * np.exp(logs + brevity), 0.0)


def _statistics(statistics: ArrayLike) -> Array:
    s = np.asarray(statistics, dtype=np.float64)
    if s.ndim != 2 or len(s) == 0 or not np.isfinite(s).all():
        raise ValueError(
            f"expected finite statistics of shape (items, d) with at least one item, found shape {s.shape}"
        )
    # The mean is the ratio whose second statistic is 1 for every item.
    return np.hstack([s, np.ones_like(s)]) if s.shape[1] == 1 else s
