"""Which elements of an update are kept, and the mean of those of several that agree on a sign: TIES and DARE.

TIES (Yadav et al. 2023, arXiv 2306.01708) trims each update to its largest elements, elects a sign, and averages those
that agree with it. DARE (Yu et al. 2024, arXiv 2311.03099) drops elements at random and enlarges the rest, so that the
expectation of the update stays: u * m / (1 - p), m_i = 1 with probability 1 - p (equation 1; here density is 1 - p).
mergekit enlarges by what keeps the tensor's L1 norm instead; the two differ by the sampling error of that norm.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterpoise.checkpoints.preflight import Pair, stretches
from counterpoise.checkpoints.rounding import wide_dtype

Keep = Callable[[Tensor], Tensor]
"""Takes the next stretch of an update and says which of its elements are kept."""
LOW_BITS = 15  # of the 31 bits of a float32 magnitude; the other 16 are counted first


def elected_mean(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Each element's weighted mean over the updates that agree with the elected sign: steps 2 and 3.

    gamma = sign(sum_t w_t u_t); the mean of u_t over A = {t : sign(u_t) = gamma}, sum_A w_t u_t / sum_A w_t (the paper:
    all w_t = 1). Zeros, which were trimmed, agree with no sign. Where the sum is exactly zero no sign is elected and the
    result is 0; mergekit elects plus there, the authors' code the commonest sign of the whole model.

    Args:
        updates: tensors of one shape, trimmed.
        weights: one per update, positive.

    >>> a, b, c = torch.tensor([3.0, -1.0]), torch.tensor([1.0, -1.0]), torch.tensor([-2.0, 4.0])
    >>> elected_mean([a, b, c], [1, 1, 1])
    tensor([2., 4.])
    """
    weighted = [update * weight for update, weight in zip(updates, weights, strict=True)]
    sign = in_order(weighted).sign()
    agrees = [(part.sign() == sign) & (part != 0) for part in weighted]
    total = in_order([part * weight for part, weight in zip(agrees, weights, strict=True)])
    elected = in_order([part * mask for part, mask in zip(weighted, agrees, strict=True)])
    return torch.where(total > 0, elected / total, 0)


def in_order(parts: Sequence[Tensor]) -> Tensor:
    """The sum of a few tensors, one after the other, as every processor adds them."""
    return functools.reduce(torch.add, parts)


@dataclass
class Keeper:
    """Says of each element, in order, whether it is among the k largest; made by `largest`, used once.

    Attributes:
        border: bits of the k-th largest magnitude.
        spare: how many elements of just that magnitude are still to be kept; the first ones are.
    """

    border: int
    spare: int

    def __call__(self, update: Tensor) -> Tensor:
        """A mask over the next flat stretch of the update."""
        bits = _bits(update)
        equal = bits == self.border
        found = int(equal.sum())
        first = equal if found <= self.spare else equal & (equal.cumsum(0) <= self.spare)
        self.spare -= min(found, self.spare)
        return (bits > self.border) | first


def largest(stretches: Callable[[], Iterable[Tensor]], density: float) -> Keeper:
    """The `Keeper` of the share `density` of all elements, largest magnitudes first, without holding or sorting them.

    k = max(1, floor(density n)) of n elements are kept, by magnitude in float32; of equal ones at the border, the first.
    The bits of a float32 magnitude are in the order of the magnitudes, so the k-th largest is found exactly by counting
    twice: the upper 16 bits of every element, then the lower 15 of those on the border.

    Args:
        stretches: gives the flat update piece by piece, the same each time; it is asked for twice.
    """
    upper = torch.zeros(1 << 16, dtype=torch.int64)
    for stretch in stretches():
        upper += torch.bincount(_bits(stretch) >> LOW_BITS, minlength=1 << 16)
    total = int(upper.sum())
    if total == 0:
        return Keeper(0, 0)
    first, left = _border(upper, max(1, int(density * total)))
    lower = torch.zeros(1 << LOW_BITS, dtype=torch.int64)
    for stretch in stretches():
        bits = _bits(stretch)
        inside = bits[bits >> LOW_BITS == first]
        lower += torch.bincount(inside & ((1 << LOW_BITS) - 1), minlength=1 << LOW_BITS)
    second, left = _border(lower, left)
    return Keeper(first << LOW_BITS | second, left)


def _border(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin of the k-th element from the top, and how many of that bin belong to the k."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, k - above


def _bits(update: Tensor) -> Tensor:
    return update.abs().float().contiguous().view(torch.int32)


def everything(update: Tensor) -> Tensor:
    """All of a stretch is kept."""
    return torch.ones_like(update, dtype=torch.bool)


def updates(pair: Pair, names: Sequence[str]) -> Iterator[Tensor]:
    """What training moved, of these tensors one after the other, stretch by stretch."""
    for name in names:
        if pair.post.dtype(name).is_floating_point:
            for _, (pre, post) in stretches(*pair.tensors(name)):
                yield update_of(pre, post)


def update_of(pre: Tensor, post: Tensor) -> Tensor:
    """post - pre, in at least float32."""
    wide = wide_dtype(pre, post)
    return post.to(wide) - pre.to(wide)


def kept(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Which elements DARE keeps of the next flat stretch of an update; stretches give what drawing at once gives."""
    return torch.rand(len(update), generator=generator) < density


def generator_for(seed: int, post: int, name: str) -> torch.Generator:
    """The random numbers of one tensor of one POST: they depend on nothing else, so neither order nor sharding counts."""
    digest = hashlib.sha256(f"{seed}/{post}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
