"""Heterogeneous Model Averaging: the ratios per block that keep most alignment at a given mean ratio."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from counterpoise.averaging.partition import Partition
from counterpoise.averaging.resident import Objective, ResidentAverage
from counterpoise.search.descent import SearchResult, spectral_descent
from counterpoise.search.simplex import project


def hma(
    resident: ResidentAverage,
    partition: Partition,
    objective: Objective,
    mean: float,
    *,
    max_passes: int = 12,
    tolerance: float = 3e-4,
    start: NDArray[np.float64] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Minimise the proxy loss over r subject to 0 <= r_k <= 1 and sum_k w_k r_k / sum_k w_k = mean.

    Lin et al. 2024, section 5 (HMA by proxy distillation). It departs from the authors' code where papers/hma.md says
    it is wrong: exact projection in place of a rescaled sigmoid, block weights in the mean, response-only loss, the true
    gradient of each ratio, and a projected spectral gradient (Barzilai-Borwein steps) in place of Adam at batch 1, so
    that a handful of full passes suffice and the same inputs give the same ratios.

    Args:
        objective: the loss over a fixed proxy set (`ProxySet.backward`); it must be deterministic.
        mean: the weighted mean of the ratios, in [0, 1].
        tolerance: stop when the next step promises less than this many nats per token.
        start: first point; by default all ratios equal to `mean`, which is MA.
    """
    begin = np.full(len(partition), float(mean)) if start is None else np.asarray(start, dtype=np.float64)
    begin = project(begin, mean, partition.weights)

    def evaluate(ratios: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        return resident.loss_and_gradient(partition, ratios, objective)

    return spectral_descent(
        evaluate,
        begin,
        lambda y: project(y, mean, partition.weights),
        partition.weights,
        max_passes=max_passes,
        tolerance=tolerance,
        progress=progress,
    )
