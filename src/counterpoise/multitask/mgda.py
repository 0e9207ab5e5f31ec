"""MGDA (Désidéri 2012; Sener and Koltun, NeurIPS 2018)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from counterpoise.multitask.jacobian import JacobianWeighting, torchjd_aggregator


class MGDA(JacobianWeighting):
    """The shortest convex combination of the tasks' gradients (Sener, Koltun: Multi-Task Learning as Multi-Objective
    Optimization, NeurIPS 2018, algorithm 2), by torchjd's Frank-Wolfe solver on raw, unnormalised gradients.

    Args:
        tasks: names, or how many.
        shared: see `JacobianWeighting`.
        tolerance: the solver stops when its step falls below this.
        max_iterations: or after so many.

    Example:
        >>> import torch
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> MGDA(2, shared=[theta])([theta[0] * 2, theta[1] * 2]).backward()
        >>> theta.grad
        tensor([1., 1.])
    """

    def __init__(
        self,
        tasks: int | Iterable[str],
        *,
        shared: Iterable[Tensor],
        tolerance: float = 1e-3,
        max_iterations: int = 100,
    ) -> None:
        aggregate = torchjd_aggregator("MGDA", epsilon=tolerance, max_iters=max_iterations)
        super().__init__(tasks, shared=shared, aggregate=aggregate)
