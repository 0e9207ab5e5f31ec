"""CAGrad (Liu, Liu, Jin, Stone, Liu, NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from counterpoise.multitask.jacobian import JacobianWeighting, torchjd_aggregator


class CAGrad(JacobianWeighting):
    """The direction that helps the worst-off task most within a ball of radius c ||g|| around the mean gradient g
    (Liu et al.: Conflict-Averse Gradient Descent, NeurIPS 2021, algorithm 1), by torchjd, which solves it with cvxpy.

    Args:
        tasks: names, or how many.
        shared: see `JacobianWeighting`.
        radius: c, >= 0; 0 is the mean gradient. The paper uses 0.4 and 0.5.
    """

    def __init__(self, tasks: int | Iterable[str], *, shared: Iterable[Tensor], radius: float = 0.4) -> None:
        super().__init__(tasks, shared=shared, aggregate=torchjd_aggregator("CAGrad", c=radius))
