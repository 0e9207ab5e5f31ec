"""DARE: drop elements of an update at random and enlarge the rest, so that its expectation stays."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def drop(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """u * m / (1 - p), m_i = 1 with probability 1 - p: Yu et al. 2024 (arXiv 2311.03099), equation 1.

    Here density is 1 - p, the share kept. mergekit enlarges by what keeps the tensor's L1 norm instead of by 1 / density;
    the two differ by the sampling error of that norm.

    >>> drop(torch.ones(8), 0.5, torch.Generator().manual_seed(0)).unique()
    tensor([0., 2.])
    """
    return update * kept(update.numel(), density, generator).view(update.shape) / density


def kept(count: int, density: float, generator: torch.Generator) -> Tensor:
    """Which of the next `count` elements are kept; drawing in pieces gives what drawing at once gives."""
    return torch.rand(count, generator=generator) < density


def generator_for(seed: int, post: int, name: str) -> torch.Generator:
    """The random numbers of one tensor of one POST: they depend on nothing else, so neither order nor sharding counts."""
    digest = hashlib.sha256(f"{seed}/{post}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
