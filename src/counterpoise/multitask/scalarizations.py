"""Fixed scalarizations: the mean of the task losses, the largest weighted one (Tchebycheff), and its smooth form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from counterpoise.multitask.losses import Batch, Tasks
from counterpoise.multitask.values import refuse_outside, weighted_sum
from counterpoise.multitask.weighting import Missing, Weighting


class Uniform(Weighting):
    """(1/m) sum_i l_i over all m tasks: what `BanditMTL` is at rho = 0, and the baseline of every comparison.

    An absent task adds nothing and the divisor stays m, so that the micro-batches of a window add up.

    Examples:
        >>> float(Uniform(2)(torch.tensor([1.0, 3.0])))
        2.0
    """

    compares = False

    def weights(self) -> list[float]:
        """The same share, 1/m, for every task."""
        return [1.0 / len(self.tasks)] * len(self.tasks)

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        share_K = torch.full_like(batch.values_K, 1.0 / len(self.tasks), requires_grad=False)
        return weighted_sum(share_K, batch.values_K, scale_K)


class Tchebycheff(Weighting):
    """max_i c_i (l_i - z_i): only the worst task is trained (Bowman 1976; for text classification Mao, Yun, Liu, Du:
    Tchebycheff Procedure for Multi-task Text Classification, ACL 2020).

    The maximum of means is not a sum over micro-batches, so the whole batch must come in one call. An absent task takes
    part with its last known loss, as a constant: while it is the worst one, the others are not trained.

    Args:
        tasks: names, or how many.
        preferences: c, >= 0 and adding up to 1; uniform by default.
        ideal: z, the losses one would wish for; 0 by default.
        missing: "hold": absent tasks take no part. See `Weighting`.

    Examples:
        >>> float(Tchebycheff(2)(torch.tensor([1.0, 3.0])))
        1.5
    """

    whole_batch_only = True

    def __init__(
        self,
        tasks: Tasks,
        *,
        preferences: Sequence[float] | None = None,
        ideal: Sequence[float] | None = None,
        missing: Missing = "last",
    ) -> None:
        super().__init__(tasks, missing=missing)
        m = len(self.tasks)
        self.preferences = [1.0 / m] * m if preferences is None else [float(x) for x in preferences]
        self.ideal = [0.0] * m if ideal is None else [float(x) for x in ideal]
        if len(self.preferences) != m or min(self.preferences) < 0.0 or abs(sum(self.preferences) - 1.0) > 1e-6:
            raise ValueError(f"preferences must be {m} numbers >= 0 that add up to 1, found {self.preferences}.")
        if len(self.ideal) != m or not all(map(math.isfinite, self.ideal)):
            raise ValueError(f"ideal must be {m} finite numbers, found {self.ideal}.")

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        return self._excess(batch).max()

    def _excess(self, batch: Batch) -> Tensor:
        values_K, indices = self.joined_by_known(batch)
        both = torch.tensor([self.preferences, self.ideal], dtype=values_K.dtype, device=values_K.device)
        preferences_K, ideal_K = both[:, indices]
        return preferences_K * (values_K - ideal_K)  # type: ignore[no-any-return]


class SmoothTchebycheff(Tchebycheff):
    """mu log sum_i exp(c_i (l_i - z_i) / mu), which tends to `Tchebycheff` as mu -> 0 (Lin et al.: Smooth Tchebycheff
    Scalarization for Multi-Objective Optimization, ICML 2024).

    Args, beside those of `Tchebycheff`:
        smoothing: mu, > 0; the paper tries 0.01 to 1.

    Examples:
        >>> round(float(SmoothTchebycheff(2, smoothing=0.1)(torch.tensor([1.0, 3.0]))), 4)
        1.5
    """

    def __init__(
        self,
        tasks: Tasks,
        *,
        smoothing: float = 0.1,
        preferences: Sequence[float] | None = None,
        ideal: Sequence[float] | None = None,
        missing: Missing = "last",
    ) -> None:
        super().__init__(tasks, preferences=preferences, ideal=ideal, missing=missing)
        refuse_outside("(0, inf)", smoothing=smoothing)  # Tchebycheff is its limit at 0
        self.smoothing = smoothing

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        excess_K = self._excess(batch)
        worst = excess_K.max().detach()  # taken off first: at a small mu the quotients overflow
        mu = max(self.smoothing, torch.finfo(excess_K.dtype).tiny)
        return worst + mu * torch.logsumexp((excess_K - worst) / mu, dim=0)
