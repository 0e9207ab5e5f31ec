"""Ratios that need no search: the rivals and controls that HMA is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from counterpoise.averaging.partition import Partition
from counterpoise.search.simplex import project


def linear_ramp(partition: Partition, mean: float) -> NDArray[np.float64]:
    """Ratios that grow linearly with depth, as steep as [0, 1] allows at this mean: LiNeS (arXiv 2410.17146).

    The deepest layers keep the whole update where the mean is 0.5 or more, as LiNeS has it; below, the first layers
    keep none of it.
    """
    depth = _depth(partition)
    low, high = (2 * mean - 1, 1.0) if mean >= 0.5 else (0.0, 2 * mean)
    return project(low + (high - low) * depth, mean, partition.weights)


def reversed_ramp(partition: Partition, mean: float) -> NDArray[np.float64]:
    """The ramp upside down: a control of the same mean and spread."""
    depth = _depth(partition)
    low, high = (2 * mean - 1, 1.0) if mean >= 0.5 else (0.0, 2 * mean)
    return project(high + (low - high) * depth, mean, partition.weights)


def random_ratios(partition: Partition, mean: float, *, seed: int) -> NDArray[np.float64]:
    """Uniform random ratios brought to this mean: a control."""
    drawn = np.random.default_rng(seed).uniform(size=len(partition))
    return project(drawn, mean, partition.weights)


def _depth(partition: Partition) -> NDArray[np.float64]:
    """Mean position of each block's layers, from 0 at the input to 1 at the output."""
    last = max(n for b in partition.blocks for n in b.layers) or 1
    return np.array([np.mean(b.layers) / last for b in partition.blocks])
