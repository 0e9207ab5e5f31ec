"""The path: a side modelled as a sum over blocks, known from its slopes along the diagonal, and minimised exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from counterpoise.statistics.bootstrap import Array

if TYPE_CHECKING:
    from scipy.interpolate import PPoly


@dataclass(frozen=True)
class Separable:
    """A loss modelled as start + sum_k G_k(r_k) on [0, 1]^K, every dG_k / dr_k a piecewise polynomial.

    When the slopes were measured on the diagonal r_k = t, the model is exact there up to the interpolation, because
    d loss / dt is the sum of the blocks' slopes. Off the diagonal it stands for a loss without cross terms: it puts row
    sums of the Hessian in the place of its diagonal, which is an approximation to be reported, not a bound.

    Attributes:
        start: the loss at r = 0.
        slopes: dG_k / dr_k, a piecewise polynomial on [0, 1] with K columns.
    """

    start: float
    slopes: PPoly

    @classmethod
    def from_slopes(cls, points: ArrayLike, gradients: ArrayLike, start: float) -> Separable:
        """The model through gradients measured at points of the diagonal, by cubic interpolation per block.

        Args:
            points: t, increasing from 0 to 1, shape (n,), n >= 4.
            gradients: d loss / d r_k at (t, ..., t), shape (n, K).
            start: the loss at t = 0.

        >>> t = np.linspace(0, 1, 5)
        >>> model = Separable.from_slopes(t, np.stack([2 * t, 4 * t**3], 1), 1.0)
        >>> round(model.value([0.5, 1.0]), 12)
        2.25
        """
        from scipy.interpolate import CubicSpline

        t, g = np.asarray(points, dtype=np.float64), np.asarray(gradients, dtype=np.float64)
        if t.ndim != 1 or len(t) < 4 or t[0] != 0.0 or t[-1] != 1.0 or not (np.diff(t) > 0).all():
            raise ValueError(f"points: expected at least four increasing numbers from 0 to 1, found {t.tolist()}")
        if g.ndim != 2 or len(g) != len(t) or not np.isfinite(g).all():
            raise ValueError(f"gradients: expected finite numbers of shape ({len(t)}, K), found shape {g.shape}")
        return cls(float(start), CubicSpline(t, g, bc_type="not-a-knot"))

    def __len__(self) -> int:
        return int(self.slopes.c.shape[-1])

    def value(self, ratios: ArrayLike) -> float:
        """The model's loss at `ratios`, shape (K,), each in [0, 1]."""
        r = self._inside(ratios)
        return self.start + float(np.trace(self._heights(r)))

    def gradient(self, ratios: ArrayLike) -> Array:
        """Its gradient there, shape (K,)."""
        return np.diagonal(self.slopes(self._inside(ratios))).copy()

    def scaled(self, best: float, gap: float) -> Separable:
        """(loss - best) / gap, as a model."""
        return Separable((self.start - best) / gap, _pieces(self.slopes.c / gap, self.slopes.x))

    def plus(self, other: Separable, weight: float) -> Separable:
        """The loss self + weight * other; both have the same knots and blocks."""
        slopes = _pieces(self.slopes.c + weight * other.slopes.c, self.slopes.x)
        return Separable(self.start + weight * other.start, slopes)

    def argmin(self) -> Array:
        """The global minimum over [0, 1]^K, block by block: the best of the ends, the knots and every root of the slope.

        Slopes need not be monotone, so a root may be a maximum, and the minimum may jump as the loss changes smoothly.
        Of equal minima the largest ratio is taken: what costs nothing is kept. Along the minima of alignment + lambda
        retention, retention never rises and alignment never falls with lambda; single ratios may jump.
        """
        best = np.empty(len(self))
        for k in range(len(self)):
            slope, height = (_pieces(p.c[:, :, k], p.x) for p in (self.slopes, self._heights))
            roots = slope.roots(discontinuity=False, extrapolate=False)
            inside = roots[np.isfinite(roots)]  # an interval where the slope is 0 ends in NaN
            candidates = np.unique(np.concatenate([self.slopes.x, np.clip(inside, 0.0, 1.0)]))[::-1]
            best[k] = candidates[int(np.argmin(height(candidates)))]
        return best

    @cached_property
    def _heights(self) -> PPoly:
        """G_k as piecewise polynomials, 0 at r = 0."""
        return self.slopes.antiderivative()

    def on_diagonal(self, points: ArrayLike) -> Array:
        """The model's loss at (t, ..., t) for each t, shape (n,)."""
        values: Array = self.start + self._heights(np.asarray(points, dtype=np.float64)).sum(1)
        return values

    def _inside(self, ratios: ArrayLike) -> Array:
        r = np.asarray(ratios, dtype=np.float64)
        if r.shape != (len(self),) or not ((r >= 0) & (r <= 1)).all():
            raise ValueError(f"ratios: expected {len(self)} numbers in [0, 1], found {r.tolist()}")
        return r


def _pieces(coefficients: Array, ends: Array) -> PPoly:
    from scipy.interpolate import PPoly  # here, as it takes most of a second and few runs search so

    return PPoly(coefficients, ends)
