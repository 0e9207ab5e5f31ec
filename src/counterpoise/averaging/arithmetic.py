"""Task arithmetic on one tensor, as mergekit's linear, task_arithmetic, ties, dare_linear and dare_ties define it.

mergekit's linear.py and generalized_task_arithmetic.py: PRE + lambda * sum_i w_i s(post_i - PRE), divided by the weights' sum
where it is normalised; with election, elements whose sign is not that of the sum are left out of both. s leaves elements out:
the smallest of each tensor (TIES) or random ones (DARE), and rescaling then restores the tensor's L1 norm. Computed in at
least float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from counterpoise.averaging.thinning import Keep, everything, generator_for, in_order, kept, largest, update_of, updates
from counterpoise.checkpoints.preflight import Pair
from counterpoise.checkpoints.rounding import narrow

SMALL = 1e-7
"""Below such an L1 norm nothing is rescaled."""


class Way(NamedTuple):
    """A method: what it leaves out, whether signs are elected, and its defaults."""

    thins: Literal["largest", "random", ""]
    elects: bool
    normalize: bool
    rescale: bool


METHODS = {
    "linear": Way("", False, True, False),
    "task_arithmetic": Way("", False, False, False),
    "ties": Way("largest", True, True, False),
    "dare_linear": Way("random", False, False, True),
    "dare_ties": Way("random", True, False, True),
}


@dataclass(frozen=True)
class Terms:
    """How one tensor is made of PRE and POSTs.

    Attributes:
        weights, densities: of the POSTs; of linear PRE's first.
        factor: mergekit's lambda.
    """

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    normalize: bool
    factor: float
    rescale: bool

    def checked(self, name: str, *, linear: bool) -> Terms:
        """Itself; a ValueError where linear's weights have no sum to divide by."""
        if linear and self.normalize and math.fsum(self.weights) == 0:
            raise ValueError(
                f"weight: expected weights whose sum is not 0, by which {name} is divided, found {self.weights}"
            )
        return self

    def shares(self, *, linear: bool) -> list[float]:
        """What each update is multiplied by where no signs are elected; mergekit divides by no sum below 1e-8."""
        total = math.fsum(self.weights)
        by = total if self.normalize and (linear or abs(total) >= 1e-8) else 1.0
        return [self.factor * w / by for w in self.weights]

    def ratio(self, *, linear: bool) -> float | None:
        """Of one POST: the share of its update; None where that is no plain average."""
        shares = self.shares(linear=linear)
        if linear:
            return shares[1] if abs(math.fsum(shares) - 1) < 1e-9 else None
        return shares[0] if self.densities[0] >= 1 else None


def kept_of(pairs: Sequence[Pair], name: str, terms: Terms, way: Way, seed: int) -> list[tuple[Keep, float]]:
    """For each POST which elements of its update are kept, and what those are multiplied by."""
    if not way.thins:
        return [(everything, 1.0)] * len(pairs)
    found = []
    for number, (pair, density) in enumerate(zip(pairs, terms.densities, strict=True)):

        def keeper(pair: Pair = pair, density: float = density, number: int = number) -> Keep:
            if density >= 1:
                return everything
            if density <= 0:
                return lambda update: torch.zeros_like(update, dtype=torch.bool)
            if way.thins == "largest":
                return largest(partial(updates, pair, [name]), density)
            return partial(kept, density=density, generator=generator_for(seed, number, name))

        scale = _rescaling(pair, name, keeper) if terms.rescale and 0 < density < 1 else 1.0
        found.append((keeper(), scale))
    return found


def _rescaling(pair: Pair, name: str, keeper: Callable[[], Keep]) -> float:
    """The L1 norm of an update over that of what is kept of it."""
    keep, before, after = keeper(), 0.0, 0.0
    for update in updates(pair, [name]):
        sizes = update.abs()
        before += float(sizes.sum(dtype=torch.float64))
        after += float((sizes * keep(update)).sum(dtype=torch.float64))
    return 1.0 if before < SMALL or after < SMALL else before / after


def mixed(
    terms: Mapping[str, Terms],
    keep: Mapping[str, Sequence[tuple[Keep, float]]],
    elected: bool,
    linear: bool,
    name: str,
    key: int,
    start: int,
    pre: Tensor,
    posts: list[Tensor],
) -> Tensor:
    """One flat stretch, in the first POST's dtype."""
    if not posts[0].is_floating_point():
        return posts[0]
    how = terms[name]
    moves = [update_of(pre, post) for post in posts]
    moves = [move * mask(move) * scale for move, (mask, scale) in zip(moves, keep[name], strict=True)]
    shares = how.shares(linear=linear)
    wide = pre.to(moves[0].dtype)
    if elected:
        update = _elected(moves, how)
    else:
        update = in_order([move * share for move, share in zip(moves, shares[-len(moves) :], strict=True)])
    if linear and (beyond := math.fsum(shares) - 1):
        update = update + wide * beyond
    return narrow(wide + update, posts[0].dtype, key=key, start=start)


def _elected(moves: Sequence[Tensor], how: Terms) -> Tensor:
    """The weighted updates that agree with the sign of their sum, which is plus where they cancel."""
    parts = [move * weight for move, weight in zip(moves, how.weights, strict=True)]
    sign = (in_order(parts) >= 0).to(parts[0].dtype) * 2 - 1
    agrees = [part.sign() == sign for part in parts]
    update = in_order([part * mask for part, mask in zip(parts, agrees, strict=True)])
    if how.normalize:
        by = in_order([mask * weight for mask, weight in zip(agrees, how.weights, strict=True)])
        update = update / torch.where(by == 0, 1.0, by)
    return update * how.factor
