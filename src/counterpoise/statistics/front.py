"""Non-dominated points and the area they dominate."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from counterpoise.statistics.bootstrap import Array


def front(points: ArrayLike) -> NDArray[np.intp]:
    """Indices of the points that no other dominates, in order; every coordinate is to be maximised.

    A point dominates another when it is at least as good everywhere and better somewhere; equal points do not dominate
    one another, so all copies of a non-dominated point are on the front.

    Args:
        points: shape (n, d), finite.
    """
    p = _points(points)
    at_least = (p[:, None, :] >= p[None, :, :]).all(-1)
    better = (p[:, None, :] > p[None, :, :]).any(-1)
    return np.flatnonzero(~(at_least & better).any(0))


def areas(x: ArrayLike, y: ArrayLike, of: int | None = None) -> Array:
    """Area dominated above the origin by m sets of n points at once; a front's hypervolume.

    More points dominate more. To be compared with `of` points, the area is the mean over all choices of so many of the n, by
    counting: the i-th highest of the j points that reach as far is a choice's highest in C(n - i, of - 1) of C(n, of).

    Args:
        x, y: shape (m, n).
        of: from 1 to n, where it is given.

    >>> areas([[1.0, 0.5]], [[0.5, 1.0]])
    array([0.75])
    >>> areas([[1.0, 0.5]], [[0.5, 1.0]], of=1)
    array([0.5])
    """
    xs, ys = (np.maximum(np.asarray(v, dtype=np.float64), 0.0) for v in (x, y))
    order, n = np.argsort(-xs, axis=1), xs.shape[1]
    xs, ys = np.take_along_axis(xs, order, 1), np.take_along_axis(ys, order, 1)
    steps = xs - np.pad(xs[:, 1:], ((0, 0), (0, 1)))
    count = n if of is None else of
    shares = np.array([math.comb(n - i, count - 1) / math.comb(n, count) for i in range(1, n + 1)])
    area: Array = np.zeros(len(xs))
    for j in range(n):
        area += steps[:, j] * (-np.sort(-ys[:, : j + 1], axis=1) @ shares[: j + 1])
    return area


def _points(points: ArrayLike) -> Array:
    p = np.asarray(points, dtype=np.float64)
    if p.ndim != 2 or not np.isfinite(p).all():
        raise ValueError(f"expected finite points of shape (n, d), found shape {p.shape}")
    return p
