"""What makes one gradient of the tasks' gradients: from a Jacobian (k, n) to (n,)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 20


def gramian(rows_KN: Tensor) -> Tensor:
    """The rows' inner products in float64 on the host, (k, k), without a float64 copy of all rows at once."""
    if rows_KN.device.type == "mps":  # which has nothing wider than float32
        rows_KN = rows_KN.cpu()
    total_KK = torch.zeros(len(rows_KN), len(rows_KN), dtype=torch.float64, device=rows_KN.device)
    for part in torch.split(rows_KN, _CHUNK, dim=1):
        total_KK += part.double() @ part.double().T
    return total_KK.cpu()


def _cosines(rows_KN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows' lengths, and of their cosines the eigenvalues above what rounding makes, with eigenvectors in columns.

    Whether rows depend on each other is asked of rows of length 1: of the rows themselves, a short one would read as
    rounding of a long one.
    """
    gramian_KK = gramian(rows_KN)
    lengths_K = gramian_KK.diagonal().sqrt()
    unit_K = torch.where(lengths_K > 0.0, 1.0 / lengths_K, 0.0)
    values, vectors = torch.linalg.eigh(unit_K[:, None] * gramian_KK * unit_K)
    noise = max((8 * torch.finfo(rows_KN.dtype).eps) ** 2, torch.finfo(values.dtype).eps)
    kept = values > values[-1] * len(values) * noise
    return lengths_K, values[kept], vectors[:, kept]


def _combined(weights_K: Tensor, rows_KN: Tensor) -> Tensor:
    return weights_K.to(rows_KN) @ rows_KN


def aligned(rows_KN: Tensor) -> Tensor:
    """The rows' mean once every singular value of theirs is the smallest, (n,)."""
    lengths_K, values, vectors = _cosines(rows_KN)
    u, s, _ = torch.linalg.svd(lengths_K[:, None] * vectors * values.sqrt(), full_matrices=False)
    weights_K = u @ ((s[-1:] / s) * u.mean(dim=0))
    return _combined(weights_K, rows_KN)


def impartial(rows_KN: Tensor) -> Tensor:
    """The combination, with weights that add up to 1, on which all rows have the same projection, (n,); 0 if none has."""
    lengths_K, values, vectors = _cosines(rows_KN)
    there = (lengths_K > 0.0).double()
    shortest_row = lengths_K[lengths_K > 0.0].min() if there.any() else 1.0
    weights_K = torch.where(there > 0.0, shortest_row / lengths_K, 0.0) * (vectors @ ((vectors.T @ there) / values))
    total = weights_K.sum()
    weights_K = weights_K / total if total.abs() > 1e-12 else torch.zeros_like(weights_K)
    return _combined(weights_K, rows_KN)


def conflict_averse(rows_KN: Tensor, *, weigh: Callable[[Tensor], Tensor], radius: float) -> Tensor:
    """The mean g, and radius ||g|| from there in the direction of the combination that `weigh` adds to the mean's weights.

    The length is taken here, of the vector: of the Gramian it is rounding once the combination is short.
    """
    gramian_KK = gramian(rows_KN)
    weights_K = weigh(gramian_KK / gramian_KK.diagonal().max().clamp(min=1e-300)) - 1.0 / len(rows_KN)
    mean_N, toward_N = rows_KN.mean(dim=0), _combined(weights_K.clamp(min=0.0), rows_KN)
    lengths = [float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (mean_N, toward_N)]
    return mean_N + toward_N * (radius * lengths[0] / lengths[1] if lengths[1] > 0.0 else 0.0)


def fair(rows_KN: Tensor, *, solve: Callable[[Tensor], Tensor], fairness: float) -> Tensor:
    """FairGrad's direction, of rows brought to a length of about 1, where the solver is exact."""
    if fairness == 1.0:  # w_i J_i stays the same when J_i is made longer: each row to length 1
        sizes_K = rows_KN.norm(dim=1, keepdim=True)
        return solve(rows_KN / sizes_K.clamp(min=torch.finfo(rows_KN.dtype).tiny))
    size = rows_KN.square().sum(dim=1).mean().sqrt()
    if not size > 0.0:
        return rows_KN.sum(dim=0)
    return solve(rows_KN / size) * size ** ((1.0 - fairness) / (1.0 + fairness))  # w scales with size^(-2a / (1 + a))


def no_longer(rows_KN: Tensor, *, aggregate: Callable[[Tensor], Tensor], most: float) -> Tensor:
    direction_N = aggregate(rows_KN)
    return direction_N * min(1.0, most / max(float(direction_N.norm()), 1e-300))


def project_weights(weights_TM: Tensor, gramian_MM: Tensor) -> Tensor:
    """The weights v >= u, per row u, with the least v' G v: those of the projection onto the dual cone.

    With v = u + z and G = R'R it is min over z >= 0 of ||R z + R u||.
    """
    from scipy.optimize import nnls

    root = _root(gramian_MM)
    rows = weights_TM.detach().cpu().double().numpy()
    solved = np.stack([u + nnls(root, -root @ u)[0] for u in rows])
    return torch.as_tensor(solved, dtype=weights_TM.dtype, device=weights_TM.device)


def shortest(rows_KN: Tensor) -> Tensor:
    """The point of the rows' convex hull that is nearest to 0, (n,).

    With G = R'R, the u >= 0 that minimises ||R u||^2 + (1 - sum u)^2 is that combination times a positive number: where
    u_i > 0, (G u)_i = 1 - sum u, and elsewhere it is at least that (Lawson, Hanson: Solving Least Squares Problems,
    chapter 23).
    """
    from scipy.optimize import nnls

    root = _root(gramian(rows_KN))
    u, _ = nnls(np.vstack([root, np.ones(len(root))]), np.append(np.zeros(len(root)), 1.0))
    return rows_KN.new_tensor(u / u.sum()) @ rows_KN


def _root(gramian_MM: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """R with R'R = G over its largest eigenvalue."""
    values, vectors = np.linalg.eigh(gramian_MM.detach().cpu().double().numpy())
    return np.sqrt(np.maximum(values, 0.0) / max(float(values[-1]), 1e-300))[:, None] * vectors.T  # type: ignore[no-any-return]


def torchjd_aggregator(name: str, **settings: object) -> Callable[[Tensor], Tensor]:
    """The aggregator of that name from torchjd, or an ImportError that says what to install."""
    try:
        import torchjd.aggregation

        aggregator: Callable[[Tensor], Tensor] = getattr(torchjd.aggregation, name)(**settings)  # CAGrad imports cvxpy
    except ImportError as error:
        raise ImportError(f"{name} needs what is not here: pip install 'counterpoise[multitask]' ({error}).") from error
    return aggregator
