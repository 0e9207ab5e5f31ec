"""Which of some candidates keeps what was demanded of a gain, and how many items it takes to be sure: plain arrays."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from counterpoise.statistics.bootstrap import RESAMPLES, paired

WITHIN = 0.05
"""Of the gain: a candidate that keeps so much less than was demanded has missed."""
POWER = 0.8
"""How often as many items as are said to do are enough."""


class Surest(NamedTuple):
    """The candidate to take.

    Attributes:
        which: None where none keeps the demanded share in the sample, or not surely enough.
        would_do: where none is sure, so many items would be enough for the surest in `POWER` of the cases, if it keeps what
            it keeps here; None where none keeps the share.
    """

    which: int | None
    sure: bool
    would_do: int | None


def surest(
    steps: ArrayLike, gain: ArrayLike, worth: ArrayLike, share: float, confidence: float, *, resamples: int = RESAMPLES
) -> Surest:
    """Of the candidates that surely keep a share of the gain the one of most worth; where none does, perhaps the surest one.

    The best of many noisy candidates is mostly one that was lucky (the winner's curse). So all that keep the share in the
    sample are held to one joint lower bound: the quantile of the largest studentised error among them, the same items
    resampled for all (single-step max-t, Westfall and Young 1993; Romano and Wolf 2005). Where none passes, the surest is
    taken if it passes at twice the risk. How often such picks miss: experiments/statistics/picks.py.

    Args:
        steps: what each candidate scores above the start, shape (items, candidates).
        gain: what the end scores above it, shape (items,); its mean is above 0.
        worth: of each candidate, shape (candidates,).
        confidence: 0 takes the sample's word.
    """
    moved, whole = np.asarray(steps, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    kept = np.flatnonzero(moved.mean(0) >= share * whole.mean())
    if not len(kept):
        return Surest(None, False, None)
    least = (share - WITHIN) * whole[:, None]
    beyond = [paired(moved[:, [i]], least, "mean", resamples=resamples) for i in kept]
    with np.errstate(divide="ignore"):
        t = np.divide([b.value for b in beyond], [b.error for b in beyond])
    furthest = np.max([b.t for b in beyond], axis=0)
    bound, least_bound = np.quantile(furthest, [confidence, max(0.0, 2 * confidence - 1)]).tolist()
    of_worth = np.asarray(worth, dtype=np.float64)[kept]
    if (t >= bound).any():
        return Surest(int(kept[np.where(t >= bound, of_worth, -np.inf).argmax()]), True, None)
    factor = (bound + float(ndtri(POWER))) / float(t.max())
    which = int(kept[t.argmax()]) if t.max() >= least_bound else None
    return Surest(which, False, _two_digits(len(moved) * factor**2))


def misses(steps: ArrayLike, gain: ArrayLike, share: float, level: float) -> NDArray[np.bool_]:
    """Which candidates surely keep less than a share of the gain, by one-sided paired t tests, shape (candidates,).

    Args:
        steps, gain: as `surest` takes them, of two items at least.
        level: of each test.

    >>> misses([[0.0, 1.0], [0.1, 1.2], [0.0, 0.9]], [1.0, 1.1, 1.0], 0.9, 0.05)
    array([ True, False])
    """
    beyond = np.asarray(steps, dtype=np.float64) - share * np.asarray(gain, dtype=np.float64)[:, None]
    error = beyond.std(0, ddof=1) / len(beyond) ** 0.5
    return np.asarray(beyond.mean(0) < stdtrit(len(beyond) - 1, level) * error)


def would_do(spread: float, confidence: float) -> int:
    """Items, two at least, with which a candidate that keeps just what is demanded is found sure, alone, in `POWER` of cases.

    Args:
        spread: the standard deviation over items of what it is beyond the demand, as a share of the gain.
    """
    return max(2, _two_digits((max(float(ndtri(confidence)) + float(ndtri(POWER)), 0.0) * spread / WITHIN) ** 2))


def _two_digits(count: float) -> int:
    step: int = 10 ** max(0, int(math.log10(max(count, 1))) - 1)
    return math.ceil(count / step) * step
