"""Quadratic programs over the unit box."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import lsq_linear

Array = NDArray[np.float64]


def box_program(curvature: ArrayLike, slope: ArrayLike) -> Array:
    """The r in [0, 1]^K that minimises r Q r / 2 + c r, for a positive semidefinite Q: bounded least squares, exact.

    A ridge of 1e-10 of the mean eigenvalue makes the minimum unique where Q is singular.

    Args:
        curvature: Q, shape (K, K), symmetric; what rounding made slightly negative counts as 0.
        slope: c, shape (K,).

    >>> box_program([[2.0, 0.0], [0.0, 2.0]], [-1.0, 4.0]).round(6) + 0.0
    array([0.5, 0. ])
    """
    q, c = np.asarray(curvature, dtype=np.float64), np.asarray(slope, dtype=np.float64)
    if q.shape != (len(c), len(c)) or not np.isfinite(q).all() or not np.isfinite(c).all():
        raise ValueError(f"box_program: expected finite Q of shape (K, K) and c of (K,), found {q.shape}, {c.shape}")
    size = max(float(np.abs(q).max()), float(np.abs(c).max()), 1e-300)
    values, vectors = np.linalg.eigh((q + q.T) / (2 * size))
    if values[0] < -1e-6 * max(values[-1], 1e-12):
        raise ValueError(f"box_program: expected a positive semidefinite Q, found the eigenvalue {values[0] * size:g}")
    ridge = 1e-10 * max(float(values.clip(0).mean()), 1e-10)
    roots = np.sqrt(values.clip(0) + ridge)
    # With B = sqrt(Q) the program is |B r - d|^2 / 2 with B d = -c.
    target = -(vectors.T @ c) / (size * roots)
    most = 100 + 20 * len(c)  # SciPy's default, one iteration a variable, ends some programs early
    solved = lsq_linear(roots[:, None] * vectors.T, target, (0.0, 1.0), method="bvls", tol=1e-14, max_iter=most)
    if not solved.success:
        raise ValueError(f"box_program: expected to converge, stopped after {most} iterations")
    return np.clip(solved.x, 0.0, 1.0)
