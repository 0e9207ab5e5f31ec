"""Proxy sets: the responses on which a search computes its objective."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from counterpoise.averaging.resident import Objective
from counterpoise.evaluation.rewards import Rated
from counterpoise.language.scoring import Example, by_length, response_nll, response_tokens
from counterpoise.ranks import is_sharded, sum_over_ranks, turn

PARTS = 8
"""A pass over a set is summed in so many parts, however many processes share them: so many may, and the bits stay."""


@dataclass(frozen=True)
class ProxySet:
    """A fixed set of responses: a deterministic objective, the mean negative log-likelihood per response token (nats).

    Attributes:
        batch_size: examples run at once; the value does not depend on it.
    """

    examples: tuple[Example, ...]
    batch_size: int = 8

    @property
    def terms(self) -> list[Objective]:
        """The objective as a sum: `Objectives`."""
        return [partial(self._run, part, gradient=True) for part in parts(self.examples, self.batch_size)]

    def backward(self, model: nn.Module) -> float:
        """The objective at the model's weights, its gradient accumulated in the parameters: an `Objective`."""
        return sum(term(model) for term in self.terms)

    @torch.no_grad()
    def nll(self, model: nn.Module) -> float:
        """The objective without its gradient."""
        return sum(self._run(part, model, gradient=False) for part in parts(self.examples, self.batch_size))

    def _run(self, batches: Sequence[list[int]], model: nn.Module, *, gradient: bool) -> float:
        """Of a model that is cut up each process runs its share of the rows; FSDP adds the gradients up."""
        tokens, total = response_tokens(self.examples), 0.0
        rank, world = turn() if is_sharded(model) else (0, 1)
        for rows in batches:
            own = rows[rank::world]
            nll = response_nll(model, [self.examples[i] for i in own or rows[-1:]])
            if not own:  # it keeps the others company
                nll = nll * 0
            if gradient:
                (nll / tokens).backward()  # type: ignore[no-untyped-call]
            total += nll.item()
        return (total if world == 1 else sum_over_ranks([total])[0]) / tokens


def parts(examples: Sequence[Example], batch_size: int) -> list[list[list[int]]]:
    """The batches of a pass in PARTS shares, each of which is summed on its own."""
    batches = [*by_length(examples, batch_size, key=lambda e: len(e.prompt) + len(e.response))]
    return [batches[n::PARTS] for n in range(PARTS)]


def best_responses(rated: Rated, size: int, *, keep: float, seed: int) -> list[Example]:
    """Of POST's responses the paper's proxy for alignment (Lin et al. 2024, section 5).

    The share `keep` with the highest reward stays, and `size` of those are drawn at random (the paper: 2000 of the best
    5000). No ability data is used.
    """
    examples, scores = rated.examples, rated.rewards.ravel()
    ranked = sorted(range(len(examples)), key=lambda i: (-scores[i], i))
    pool = ranked[: max(1, round(keep * len(ranked)))]
    chosen = pool if len(pool) <= size else random.Random(seed).sample(pool, size)
    return [examples[i] for i in sorted(chosen)]
