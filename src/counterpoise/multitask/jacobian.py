"""Methods that combine the tasks' gradients instead of their losses, through torchjd's aggregators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor

from counterpoise.multitask.losses import Batch
from counterpoise.multitask.shared import jacobian, shared_parameters
from counterpoise.multitask.weighting import Weighting


class JacobianWeighting(Weighting):
    """A scalar whose backward leaves the aggregated gradient on the shared parameters and, on every other parameter,
    the gradient of the plain sum of losses: each head gets its own task's.

    With J (one row per task, over the shared parameters) and its aggregation g(J), the scalar is
    sum_i l_i + <g(J) - sum_i J_i, theta - stop(theta)>: the second term is 0 and its gradient replaces the first one's
    on the shared parameters. It costs one backward pass per task over the shared part, and the usual one.

    A pass per task is cheap when each task has a graph of its own: one forward pass per task, and the losses given as a
    mapping or a sequence. From one forward pass of all rows, or losses stacked beforehand, it costs the whole batch.

    The rows must be the whole batch's, so gradient accumulation and several processes raise.

    Args:
        tasks: names, or how many.
        shared: the parameters that all tasks share, for instance `encoder.parameters()`.
        aggregate: the map from a Jacobian (k, n) to a gradient (n,), for instance a torchjd aggregator.
    """

    whole_batch_only: ClassVar[bool] = True

    def __init__(
        self, tasks: int | Iterable[str], *, shared: Iterable[Tensor], aggregate: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(tasks)
        self.shared = shared_parameters(shared)
        self.aggregate = aggregate

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        """The sum of the losses, with the shared parameters' gradient exchanged."""
        total = batch.values_K.sum()
        if not torch.is_grad_enabled() or not total.requires_grad:
            return total
        rows_KN = jacobian(batch.single(), self.shared)
        if not bool(rows_KN.isfinite().all()):  # no aggregator can use it; the loss says what is wrong
            return total
        change_N = self.aggregate(rows_KN) - rows_KN.sum(dim=0)
        parts = torch.split(change_N, [p.numel() for p in self.shared])
        for parameter, change in zip(self.shared, parts, strict=True):
            moved = parameter - parameter.detach()
            total = total + (change.reshape(parameter.shape).to(parameter.dtype) * moved).sum()
        return total


def torchjd_aggregator(name: str, **settings: object) -> Callable[[Tensor], Tensor]:
    """The aggregator of that name from torchjd, or an ImportError that says what to install."""
    try:
        import torchjd.aggregation

        aggregator: Callable[[Tensor], Tensor] = getattr(torchjd.aggregation, name)(**settings)  # CAGrad imports cvxpy
    except ImportError as error:
        raise ImportError(f"{name} needs what is not here: pip install 'counterpoise[multitask]' ({error}).") from error
    return aggregator
