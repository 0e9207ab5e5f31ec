"""GradNorm (Chen, Badrinarayanan, Lee, Rabinovich, ICML 2018)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from counterpoise.multitask.losses import Batch, Tasks, WindowMeans
from counterpoise.multitask.shared import jacobian, shared_parameters
from counterpoise.multitask.values import on_device, refuse_outside, weighted_sum
from counterpoise.multitask.weighting import Weighting


class GradNorm(Weighting):
    """Learns weights w_i under which all tasks train at similar rates: w descends on
    sum_i |G_i - mean(G) r_i^a|, where G_i = ||w_i grad l_i|| on the shared parameters and
    r_i = (l_i / l_i(0)) / mean(l / l(0)) (Chen et al.: GradNorm, ICML 2018, equation 2; mean(G) r_i^a held constant).

    After each step w is rescaled to add up to m. One extra backward pass per task, over the shared parameters only
    (see `JacobianWeighting` for how to keep it cheap).
    Departures: w takes an Adam step of its own (the paper leaves the optimiser open) and is kept above 1e-6;
    absent tasks count with their last known loss and gradient norm; l_i(0) is the first loss above 0, until which the
    task counts as trained at the common rate, and a loss below 0 counts as 0.

    Args:
        tasks: names, or how many.
        shared: parameters that all tasks share; the paper takes the last shared layer's weights.
        asymmetry: a, the pull back to a common rate; the paper uses 1.5 and 0.12.
        lr: step size of w; the paper uses 0.025.

    Examples:
        >>> theta = torch.ones(2, requires_grad=True)
        >>> weighting = GradNorm(2, shared=[theta])
        >>> weighting(torch.stack([theta.square().sum(), 3 * theta.square().sum()])).backward()
        >>> weighting.step()
        >>> [round(w, 3) for w in weighting.weights()]
        [1.025, 0.975]
    """

    whole_batch_only = True
    remembers: ClassVar[Mapping[str, str]] = {
        "weights": "_weights_M", "adam": "_adam", "initial": "_initial", "norms": "_norms_K", "known_norms": "_known_norms",
    }  # fmt: skip

    def __init__(self, tasks: Tasks, *, shared: Iterable[Tensor], asymmetry: float = 1.5, lr: float = 0.025) -> None:
        super().__init__(tasks)
        self.shared = shared_parameters(shared)
        refuse_outside("[0, inf)", asymmetry=asymmetry)
        refuse_outside("(0, inf)", lr=lr)
        self.asymmetry, self.lr = asymmetry, lr
        self.reset()

    def reset(self) -> None:
        super().reset()
        # A plain tensor: neither the user's optimiser nor .to(dtype) may touch it.
        self._weights_M = torch.ones(len(self.tasks), dtype=torch.float64)
        self._adam = torch.optim.Adam([self._weights_M], lr=self.lr)
        self._initial = [math.nan] * len(self.tasks)
        self._norms_K: Tensor | None = None
        self._known_norms = [math.nan] * len(self.tasks)

    def weights(self) -> list[float]:
        """w, in task order."""
        return self._weights_M.tolist()  # type: ignore[no-any-return]

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        """sum_i w_i l_i; in training also measures each task's gradient on the shared parameters."""
        if self.training and torch.is_grad_enabled():
            rows_KN, _ = jacobian(batch.single(), self.shared)
            self._norms_K = torch.linalg.vector_norm(rows_KN, dim=1, dtype=on_device([], rows_KN.device).dtype)
        return weighted_sum(batch.of_present(self._weights_M), batch.values_K, scale_K)

    def update(self, means: WindowMeans) -> None:
        """One step of w on the gradient norms that `combine` measured."""
        if self._norms_K is None:
            return
        present = [i for i, c in enumerate(means.counts) if c > 0.0]
        for i in present:
            if math.isnan(self._initial[i]) and means.means[i] > 0.0:
                self._initial[i] = means.means[i]
        norms_K, self._norms_K = self._norms_K.double().cpu(), None
        if not bool(norms_K.isfinite().all()):
            return
        for i, norm in zip(present, norms_K.tolist(), strict=True):
            self._known_norms[i] = norm
        losses, _ = self.compared(means)
        known = [i for i, norm in enumerate(self._known_norms) if math.isfinite(norm)]
        norms_K = torch.tensor(self._known_norms, dtype=torch.float64)[known]
        ratios = [losses[i] / u if (u := self._initial[i]) > 0.0 else 1.0 for i in known]
        ratios_K = torch.tensor(ratios, dtype=torch.float64).clamp(min=0.0)
        weighted_K = self._weights_M[known] * norms_K
        target_K = weighted_K.mean() * (ratios_K / ratios_K.mean().clamp(min=1e-300)) ** self.asymmetry
        self._weights_M.grad = torch.zeros_like(self._weights_M)
        self._weights_M.grad[known] = torch.sign(weighted_K - target_K) * norms_K
        self._adam.step()
        self._weights_M.grad = None
        self._weights_M.clamp_(min=1e-6)
        self._weights_M.mul_(len(self.tasks) / self._weights_M.sum())

    def abandon(self) -> None:
        self._norms_K = None
