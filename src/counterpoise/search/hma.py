"""Ratios of a given mean: the projection onto them, Heterogeneous Model Averaging, its rivals and controls."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from counterpoise.averaging.partition import Partition
from counterpoise.averaging.resident import Objectives, ResidentAverage
from counterpoise.records import Progress
from counterpoise.search.descent import SearchResult, spectral_descent
from counterpoise.statistics.bootstrap import Array


def project(point: ArrayLike, mean: float, weights: ArrayLike) -> Array:
    """The r in [0, 1]^K of this mean nearest to `point` in the metric sum_k w_k (r_k - y_k)^2.

    In that metric r_k = clip(y_k - tau, 0, 1), and the tau that meets the mean is found between two breakpoints
    of a piecewise linear, decreasing function: exact, no iteration. Splitting a block in two halves of half its weight
    changes nothing. It replaces the paper's rescaled sigmoid, which does not keep the ratios within [0, 1]
    (papers/hma.md).

    Args:
        point: y, shape (K,).
        mean: the weighted mean wanted, in [0, 1].
        weights: w > 0, shape (K,).

    Returns:
        r, float64 of shape (K,).

    >>> project([0.9, 0.5, 0.1], 0.5, [1, 1, 1])
    array([0.9, 0.5, 0.1])
    >>> project([2.0, 0.5, 0.5], 0.5, [1, 1, 1])
    array([1.  , 0.25, 0.25])
    """
    y, w = np.asarray(point, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if not 0.0 <= mean <= 1.0:
        raise ValueError(f"mean: expected a number in [0.0, 1.0], found {mean}")
    if y.shape != w.shape or y.ndim != 1 or not (w > 0).all() or not np.isfinite(y).all():
        raise ValueError(f"project: expected finite points and positive weights of one shape (K,), found {y} and {w}")
    w = w / w.sum()
    # At each breakpoint tau one coordinate meets a bound; between two of them the mean is linear in tau.
    taus = np.sort(np.concatenate([y - 1.0, y]))
    means = np.clip(y[None, :] - taus[:, None], 0.0, 1.0) @ w
    right = int(np.searchsorted(-means, -mean, side="left"))
    if right == 0:
        return np.ones_like(y)
    right = min(right, len(taus) - 1)
    left = right - 1
    gap = means[left] - means[right]
    share = (means[left] - mean) / gap if gap > 0 else 0.0
    tau = taus[left] + share * (taus[right] - taus[left])
    projected: Array = np.clip(y - tau, 0.0, 1.0)
    return projected


def hma(
    resident: ResidentAverage,
    partition: Partition,
    objective: Objectives,
    mean: float,
    *,
    max_passes: int = 12,
    tolerance: float = 3e-4,
    start: Array | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Minimise the proxy loss over r subject to 0 <= r_k <= 1 and sum_k w_k r_k / sum_k w_k = mean.

    Lin et al. 2024, section 5 (HMA by proxy distillation). It departs from the authors' code where papers/hma.md says
    it is wrong: exact projection in place of a rescaled sigmoid, block weights in the mean, response-only loss, the true
    gradient of each ratio, and a projected spectral gradient (Barzilai-Borwein steps) in place of Adam at batch 1, so
    that a handful of full passes suffice and the same inputs give the same ratios.

    Args:
        objective: the loss over a fixed proxy set (`ProxySet.terms`); it must be deterministic.
        mean: the weighted mean of the ratios, in [0, 1].
        tolerance: stop when the next step promises less than this many nats per token.
        start: first point; by default all ratios equal to `mean`, which is MA.
    """
    begin = np.full(len(partition), float(mean)) if start is None else np.asarray(start, dtype=np.float64)
    begin = project(begin, mean, partition.weights)

    return spectral_descent(
        lambda ratios: resident.loss_and_gradient(partition, ratios, objective),
        begin,
        lambda y: project(y, mean, partition.weights),
        partition.weights,
        max_passes=max_passes,
        tolerance=tolerance,
        progress=progress,
    )


def linear_ramp(partition: Partition, mean: float, slope: float = 1.0) -> Array:
    """Ratios that grow with depth: linear in it, shifted to this mean, cut off at 0 and 1.

    Slope 0 is plain averaging, 1 as steep as [0, 1] allows without being cut, which is LiNeS (arXiv 2410.17146), and
    infinity the step: the deepest layers whole, the first ones none, one between them in part. -1 is LiNeS upside down, a
    control of the same mean and spread. Blocks outside the layers count as the first one.

    With slope 1 the deepest layers keep the whole update where the mean is 0.5 or more, as LiNeS has it; below, the first
    layers keep none of it.

    Args:
        mean: in [0, 1]; met exactly.

    Returns:
        float64 of shape (K,), in [0, 1].
    """
    if slope == 0:
        return np.full(len(partition), float(mean))
    last = max(n for b in partition.blocks for n in b.layers) or 1
    depth = np.array(
        [np.mean(b.layers or (0,)) / last for b in partition.blocks]
    )  # from 0 at the input to 1 at the output
    if np.isinf(slope):  # so far apart that one block is cut at neither end, at most
        return project(np.sign(slope) * np.unique(depth, return_inverse=True)[1], mean, partition.weights)
    start, end = (2 * mean - 1, 1.0) if mean >= 0.5 else (0.0, 2 * mean)
    if slope < 0:
        start, end, slope = end, start, -slope
    return project(start + slope * (end - start) * depth, mean, partition.weights)


def random_ratios(partition: Partition, mean: float, *, seed: int) -> Array:
    """Uniform random ratios brought to this mean: a control."""
    return project(np.random.default_rng(seed).uniform(size=len(partition)), mean, partition.weights)
