"""UPGrad (Quinton, Rey 2024)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from counterpoise.multitask.jacobian import JacobianWeighting, torchjd_aggregator


class UPGrad(JacobianWeighting):
    """The mean of the tasks' gradients, each first projected onto the directions that no task opposes (Quinton, Rey:
    Jacobian Descent for Multi-Objective Optimization, 2024, section 3), by torchjd.

    Departure: torchjd's default projector needs quadprog and shifts the Gramian by 1e-4 to be solvable; here the same
    quadratic program is solved as non-negative least squares by scipy, unshifted.

    Args:
        tasks: names, or how many.
        shared: see `JacobianWeighting`.

    Example:
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> UPGrad(2, shared=[theta])([theta[0], theta[1] - theta[0]]).backward()
        >>> theta.grad
        tensor([0.2500, 0.7500])
    """

    def __init__(self, tasks: int | Iterable[str], *, shared: Iterable[Tensor]) -> None:
        super().__init__(tasks, shared=shared, aggregate=torchjd_aggregator("UPGrad", projector=project_weights))


def project_weights(weights_TM: Tensor, gramian_MM: Tensor) -> Tensor:
    """The weights v >= u, per row u, with the least v' G v: those of the projection onto the dual cone.

    With v = u + z and G = R'R it is min over z >= 0 of ||R z + R u||.
    """
    from scipy.optimize import nnls

    values, vectors = np.linalg.eigh(gramian_MM.detach().cpu().double().numpy())
    root = np.sqrt(np.maximum(values, 0.0) / max(float(values[-1]), 1e-300))[:, None] * vectors.T
    rows = weights_TM.detach().cpu().double().numpy()
    solved = np.stack([u + nnls(root, -root @ u)[0] for u in rows])
    return torch.as_tensor(solved, dtype=weights_TM.dtype, device=weights_TM.device)
