"""Uniform weighting: the mean of the task losses, the baseline of every comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise.multitask.losses import Batch
from counterpoise.multitask.weighting import Weighting, weighted_sum


class Uniform(Weighting):
    """(1/m) sum_i l_i over all m tasks: what `BanditMTL` is at rho = 0.

    An absent task adds nothing and the divisor stays m, so that the micro-batches of a window add up.

    Example:
        >>> float(Uniform(2)(torch.tensor([1.0, 3.0])))
        2.0
    """

    def weights(self) -> list[float]:
        """The same share, 1/m, for every task."""
        return [1.0 / len(self.tasks)] * len(self.tasks)

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        """The sum of the scaled losses over m."""
        share_K = torch.full_like(batch.values_K, 1.0 / len(self.tasks), requires_grad=False)
        return weighted_sum(share_K, batch.values_K, scale_K)
