"""Exact projection onto {r : lower <= r_k <= upper, sum_k w_k r_k / sum_k w_k = mean}."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def project(
    point: ArrayLike, mean: float, weights: ArrayLike, *, lower: float = 0.0, upper: float = 1.0
) -> NDArray[np.float64]:
    """The feasible r nearest to `point` in the metric sum_k w_k (r_k - y_k)^2.

    In that metric r_k = clip(y_k - tau, lower, upper), and the tau that meets the mean is found between two breakpoints
    of a piecewise linear, decreasing function: exact, no iteration. Splitting a block in two halves of half its weight
    changes nothing. It replaces the paper's rescaled sigmoid, which does not keep the ratios within [0, 1]
    (papers/hma.md).

    Args:
        point: y, shape (K,).
        mean: the weighted mean wanted, in [lower, upper].
        weights: w > 0, shape (K,).

    Returns:
        r, float64 of shape (K,).

    >>> project([0.9, 0.5, 0.1], 0.5, [1, 1, 1])
    array([0.9, 0.5, 0.1])
    >>> project([2.0, 0.5, 0.5], 0.5, [1, 1, 1])
    array([1.  , 0.25, 0.25])
    """
    y, w = np.asarray(point, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if not lower <= mean <= upper:
        raise ValueError(f"mean: expected a number in [{lower}, {upper}], found {mean}")
    if y.shape != w.shape or y.ndim != 1 or not (w > 0).all() or not np.isfinite(y).all():
        raise ValueError(f"project: expected finite points and positive weights of one shape (K,), found {y} and {w}")
    w = w / w.sum()
    # At each breakpoint tau one coordinate meets a bound; between two of them the mean is linear in tau.
    taus = np.sort(np.concatenate([y - upper, y - lower]))
    means = np.clip(y[None, :] - taus[:, None], lower, upper) @ w
    right = int(np.searchsorted(-means, -mean, side="left"))
    if right == 0:
        return np.full_like(y, upper)
    right = min(right, len(taus) - 1)
    left = right - 1
    gap = means[left] - means[right]
    share = (means[left] - mean) / gap if gap > 0 else 0.0
    tau = taus[left] + share * (taus[right] - taus[left])
    projected: NDArray[np.float64] = np.clip(y - tau, lower, upper)
    return projected
