"""The two-sided search: ratios that lose least of alignment and of retention together, for every price lambda.

HMA asks which blocks can be given back most cheaply for the reward, at a fixed mean, and never looks at what is being
restored. Here both sides are losses of the same ratios, each scaled so that PRE and POST differ by 1, and
F_A(r) + lambda F_R(r) is minimised over 0 <= r_k <= 1 with no constraint on the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from counterpoise.records import Progress
from counterpoise.search.descent import Evaluate, spectral_descent
from counterpoise.search.separable import Separable
from counterpoise.search.sides import Scale, Side, Slopes
from counterpoise.search.worst import Sides, minimax_descent, worst
from counterpoise.statistics.bootstrap import Array

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the path measures both sides on the diagonal: ten passes in all with one retention set."""


@dataclass(frozen=True)
class Found:
    """The ratios for one lambda.

    Attributes:
        alignment: F_A there, scaled: 0 at POST, 1 at PRE. The path's is the model's, the exact search's was measured.
        retention: each R_t there, scaled: 0 at PRE, 1 at POST.
        shares: the adversary's weight of each retention set; equal when rho = 0.
        passes: forward and backward passes that this lambda took beyond the diagonal; a point of two sides is two.
        converged: False when `max_passes` ended it.
    """

    weight: float
    ratios: tuple[float, ...]
    alignment: float
    retention: Mapping[str, float]
    shares: Mapping[str, float]
    passes: int
    converged: bool

    @property
    def value(self) -> float:
        """F_A + lambda sum_t p_t R_t."""
        return self.alignment + self.weight * sum(self.shares[t] * r for t, r in self.retention.items())


@dataclass(frozen=True)
class Diagonal:
    """Both sides along the diagonal, scaled, as separable models.

    Attributes:
        passes: over both sides; five points of two sides are ten.
        misfit: the largest difference between a model and the measured loss at the points of the diagonal, where only
            the interpolation (and, for a sampled side, the noise) can part them.
    """

    alignment: Separable
    retention: Mapping[str, Separable]
    alignment_scale: Scale
    retention_scales: Mapping[str, Scale]
    passes: int
    misfit: float


def measure(alignment: Side, retention: Mapping[str, Side], points: Sequence[float] = POINTS) -> Diagonal:
    """Both sides and their gradients at points of the diagonal; see `diagonal_of`."""
    return diagonal_of(alignment.along(points), {name: side.along(points) for name, side in retention.items()})


def diagonal_of(alignment: Slopes, retention: Mapping[str, Slopes]) -> Diagonal:
    """Both sides as scaled separable models, from their slopes at points of the diagonal.

    Raises:
        ValueError: a side that does not get worse towards the other end, which leaves nothing to keep.
    """
    if not retention:
        raise ValueError("retention: expected at least one set of what PRE says, found none")
    scale = Scale.between(alignment.values[-1], alignment.values[0], "alignment")
    model, misfit = _modelled(alignment, scale)
    models, scales, passes = {}, {}, alignment.passes
    for name, kept in retention.items():
        scales[name] = Scale.between(kept.values[0], kept.values[-1], f"retention {name}")
        models[name], another = _modelled(kept, scales[name])
        passes, misfit = passes + kept.passes, max(misfit, another)
    return Diagonal(model, models, scale, scales, passes, misfit)


def path(diagonal: Diagonal, weights: Sequence[float], *, rho: float = 0.0) -> list[Found]:
    """The ratios for every lambda from the diagonal alone: no further pass.

    With one retention set, or rho = 0 (their mean), the separable model is minimised exactly. With rho > 0 the worst
    mixture couples the blocks; the model, which costs no pass, is then descended from the minima for the mean, for each
    set alone and for the best response at each of those, and the best end is kept.

    Args:
        weights: lambda, the price of retention in units of alignment.
        rho: radius of the adversary's KL ball around equal shares of the retention sets.
    """
    found = []
    for weight in weights:
        ratios = _least(diagonal, float(weight), rho)
        values = np.array([m.value(ratios) for m in diagonal.retention.values()])
        found.append(_found(diagonal.retention, weight, rho, ratios, diagonal.alignment.value(ratios), values, 0, True))
    return found


def exact(
    diagonal: Diagonal,
    alignment: Side,
    retention: Mapping[str, Side],
    weights: Sequence[float],
    *,
    rho: float = 0.0,
    max_passes: int = 12,
    tolerance: float = 5e-4,
    progress: Progress | None = None,
) -> list[Found]:
    """Descend the true F_A + lambda max_p sum_t p_t R_t from the path, lambda by lambda.

    Projected spectral gradient (`spectral_descent` in the box; `minimax_descent` when rho > 0), from the best point known
    for this lambda: the path's, any point evaluated for an earlier lambda, or the best point of the diagonal, which is
    MA. So no result is worse than the path's or MA's in its own objective. Where the alignment side samples anew
    (`Side.fixed` is False), each lambda descends the loss anchored at its own start, and only the path's point is tried.

    Args:
        max_passes: points evaluated for each lambda, at most.
        tolerance: stop when the next step promises less than this much of the objective.
    """
    size, found = len(diagonal.alignment), []
    kept = [diagonal.retention_scales[t].of(side.near(np.zeros(size))) for t, side in retention.items()]
    seen = _Seen(diagonal.alignment_scale.of(alignment.near(np.ones(size))), kept) if alignment.fixed else None
    for number, start in enumerate(path(diagonal, weights, rho=rho)):
        begin = np.array(start.ratios)
        both = seen or _Seen(diagonal.alignment_scale.of(alignment.near(begin)), kept)
        before = both.passes
        if seen is not None:
            both.at(begin)
            both.at(np.full(size, _best_mean(diagonal, start.weight, rho)))
            begin = both.best(start.weight, rho)
        ratios, converged = _descend(both.at, begin, start.weight, rho, max_passes, tolerance)
        end, passes = both.at(ratios), both.passes - before
        found.append(_found(retention, start.weight, rho, ratios, end.value, end.values, passes, converged))
        if progress is not None:
            progress(number + 1, len(weights))
    return found


class _Seen:
    """Every point evaluated so far: both sides there, so that another lambda asks nothing twice."""

    def __init__(self, alignment: Evaluate, retention: Sequence[Evaluate]) -> None:
        self._alignment, self._retention = alignment, retention
        self._points: dict[bytes, tuple[Array, Sides]] = {}

    @property
    def passes(self) -> int:
        return len(self._points) * (1 + len(self._retention))

    def best(self, weight: float, rho: float) -> Array:
        """The point of least F_A + lambda max_p sum_t p_t R_t among all seen."""
        return min(self._points.values(), key=lambda p: p[1].priced(weight, rho)[0])[0]

    def at(self, ratios: Array) -> Sides:
        key = ratios.tobytes()
        if key not in self._points:
            value, gradient = self._alignment(ratios)
            kept = [side(ratios) for side in self._retention]
            values, gradients = np.array([v for v, _ in kept]), np.stack([g for _, g in kept])
            self._points[key] = (ratios.copy(), Sides(value, gradient, values, gradients))
        return self._points[key][1]


def _descend(
    at: Callable[[Array], Sides], begin: Array, weight: float, rho: float, max_passes: int, tolerance: float
) -> tuple[Array, bool]:
    """The end of a descent in the box: through kinks where several sets compete, else by spectral gradient."""
    if rho > 0 and len(at(begin).values) > 1:
        return minimax_descent(at, begin, weight=weight, rho=rho, max_passes=max_passes, tolerance=tolerance)
    run = spectral_descent(
        lambda r: at(r).priced(weight, rho),
        begin,
        lambda y: np.clip(y, 0.0, 1.0),
        np.ones(len(begin)),
        max_passes=max_passes,
        tolerance=tolerance,
        first_move=0.1,
    )
    return np.array(run.ratios), run.converged


def _modelled(slopes: Slopes, scale: Scale) -> tuple[Separable, float]:
    """A side's scaled model, and its largest difference from what was measured."""
    model = Separable.from_slopes(slopes.points, slopes.gradients, float(slopes.values[0]))
    model = model.scaled(scale.best, scale.gap)
    measured = (slopes.values - scale.best) / scale.gap
    return model, float(np.abs(model.on_diagonal(slopes.points) - measured).max())


def _mean(models: Sequence[Separable], shares: Array) -> Separable:
    """sum_t p_t R_t, as a model."""
    total = models[0].plus(models[0], float(shares[0]) - 1.0)
    for model, share in zip(models[1:], shares[1:], strict=True):
        total = total.plus(model, float(share))
    return total


def _least(diagonal: Diagonal, weight: float, rho: float) -> Array:
    """The minimum of the model for one lambda."""
    models, loss = list(diagonal.retention.values()), diagonal.alignment
    even = np.full(len(models), 1 / len(models))

    def minimum(shares: Array) -> Array:
        return loss.plus(_mean(models, shares), weight).argmin()

    if len(models) == 1 or rho == 0:
        return minimum(even)

    def at(ratios: Array) -> Sides:
        values, gradients = [m.value(ratios) for m in models], [m.gradient(ratios) for m in models]
        return Sides(loss.value(ratios), loss.gradient(ratios), np.array(values), np.stack(gradients))

    starts = [minimum(p) for p in (even, *np.eye(len(models)))]
    starts += [minimum(worst(at(r).values, at(r).gradients, rho).weights) for r in starts]
    ends = [_descend(at, start, weight, rho, 60, 1e-7)[0] for start in starts]
    return min(ends, key=lambda r: at(r).priced(weight, rho)[0])


def _best_mean(diagonal: Diagonal, weight: float, rho: float) -> float:
    """The t of least F_A + lambda max_p sum_t p_t R_t on the diagonal, to a thousandth."""
    grid = np.linspace(0.0, 1.0, 1001)
    a = diagonal.alignment.on_diagonal(grid)
    kept = np.stack([m.on_diagonal(grid) for m in diagonal.retention.values()], 1)
    most = [worst(row, np.zeros((len(row), 1)), rho).value for row in kept]
    return float(grid[int(np.argmin(a + weight * np.array(most)))])


def _found(
    sets: Iterable[str],
    weight: float,
    rho: float,
    ratios: Array,
    alignment: float,
    values: Array,
    passes: int,
    done: bool,
) -> Found:
    shares = worst(values, np.zeros((len(values), 1)), rho).weights
    retention, shared = ({t: float(v) for t, v in zip(sets, of, strict=True)} for of in (values, shares))
    return Found(float(weight), tuple(map(float, ratios)), float(alignment), retention, shared, passes, done)
