"""Uncertainty weighting (Kendall, Gal, Cipolla, CVPR 2018), and IMTL-L, which is twice it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from counterpoise.multitask.losses import Batch, Tasks
from counterpoise.multitask.values import weighted_sum, wide
from counterpoise.multitask.weighting import Weighting
from counterpoise.ranks import average_gradients


class UncertaintyWeighting(Weighting):
    """sum_i exp(-s_i) l_i / 2 + s_i / 2 with learned log variances s_i (Kendall, Gal, Cipolla: Multi-Task Learning
    Using Uncertainty to Weigh Losses, CVPR 2018, equation 7 with s = log sigma^2).

    The s_i are the module's parameters: give them to the optimiser. They start at 0 (the paper calls the result robust
    to it). Departures: inside a window each call adds its part (its count over the window's) of both terms, so that the
    micro-batches add up to the big batch; without `window_counts` an absent task's s_i does not move.

    Examples:
        >>> weighting = UncertaintyWeighting(2)
        >>> optimizer = torch.optim.SGD(weighting.parameters(), lr=0.1)
        >>> float(weighting(torch.tensor([1.0, 3.0])).detach())
        2.0
    """

    compares = False

    def __init__(self, tasks: Tasks, *, micro_batches: int = 1) -> None:
        super().__init__(tasks, micro_batches=micro_batches)
        self.log_variance_M = nn.Parameter(torch.zeros(len(self.tasks)))

    def reset(self) -> None:
        super().reset()
        nn.init.zeros_(self.log_variance_M)

    def weights(self) -> list[float]:
        """exp(-s_i) / 2, what each task's loss is multiplied with, in task order."""
        return [float(x) for x in (0.5 * torch.exp(-self.log_variance_M.detach().double())).tolist()]

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        """Both terms, for the tasks present."""
        log_variance_M: Tensor = self.log_variance_M
        if self.averages_gradients:
            (log_variance_M,) = average_gradients(log_variance_M)
        log_variance_K = batch.of_present(log_variance_M)
        terms_K = 0.5 * torch.exp(-log_variance_K) * wide(batch.values_K) + 0.5 * log_variance_K
        return weighted_sum(torch.ones_like(terms_K, requires_grad=False), terms_K, scale_K)


class IMTLL(UncertaintyWeighting):
    """sum_i exp(s_i) l_i - s_i with learned scales s_i, under which all scaled losses come to 1 (Liu et al.: Towards
    Impartial Multi-task Learning, ICLR 2021, section 3.2): twice `UncertaintyWeighting`, of which s_i = -log sigma_i^2.

    Losses must be positive.

    Examples:
        >>> float(IMTLL(2)(torch.tensor([1.0, 3.0])).detach())
        4.0
    """

    def weights(self) -> list[float]:
        """exp(s_i), what each task's loss is multiplied with, in task order."""
        return [2.0 * w for w in super().weights()]

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        return 2.0 * super().combine(batch, scale_K)
