"""PCGrad (Yu, Kumar, Gupta, Levine, Hausman, Finn, NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from counterpoise.multitask.jacobian import JacobianWeighting, torchjd_aggregator


class PCGrad(JacobianWeighting):
    """The sum of the tasks' gradients after removing from each, in random order, its conflict with every other
    (Yu et al.: Gradient Surgery for Multi-Task Learning, NeurIPS 2020, algorithm 1), by torchjd.

    The order comes from torch's global generator: seed it to repeat a run.

    Args:
        tasks: names, or how many.
        shared: see `JacobianWeighting`.

    Example:
        >>> import torch
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> PCGrad(2, shared=[theta])([theta[0], theta[1] - theta[0]]).backward()
        >>> theta.grad
        tensor([0.5000, 1.5000])
    """

    def __init__(self, tasks: int | Iterable[str], *, shared: Iterable[Tensor]) -> None:
        super().__init__(tasks, shared=shared, aggregate=torchjd_aggregator("PCGrad"))
