"""Proxy sets: the responses on which a search computes its objective, good ones imitated or set against bad ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike
from torch import Tensor, nn

from counterpoise.averaging.resident import Objective
from counterpoise.evaluation.rewards import Rated
from counterpoise.language.scoring import Example, by_length, response_nll, response_tokens, row_nlls
from counterpoise.ranks import is_sharded, turn
from counterpoise.statistics.bootstrap import Array

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
        tokens, total = response_tokens(self.examples), 0.0
        for rows in batches:
            some = [self.examples[i] for i in rows]
            nll = nlls(model, some).sum() if is_sharded(model) else response_nll(model, some)
            if gradient:
                (nll / tokens).backward()  # type: ignore[no-untyped-call]
            total += nll.item()
        return total / tokens


@dataclass(frozen=True)
class WeightedSet:
    """An objective: sum_i w_i NLL_i over the number of response tokens, NLL_i in nats.

    With advantages as weights it is the contrast of good against bad responses: minus the advantage-weighted
    log-likelihood, whose gradient at the model that drew the responses is minus the policy gradient of the reward.
    """

    examples: tuple[Example, ...]
    weights: tuple[float, ...]
    batch_size: int = 8
    temperature: float = 1.0

    @property
    def terms(self) -> list[Objective]:
        """The objective as a sum: `Objectives`."""
        return [partial(self._run, part) for part in parts(self.examples, self.batch_size)]

    def backward(self, model: nn.Module) -> float:
        """The objective, its gradient accumulated in the parameters: an `Objective`."""
        return sum(term(model) for term in self.terms)

    def _run(self, batches: Sequence[list[int]], model: nn.Module) -> float:
        tokens, total = response_tokens(self.examples), 0.0
        for rows in batches:
            nll_B = nlls(model, [self.examples[i] for i in rows], temperature=self.temperature)
            loss = (nll_B * nll_B.new_tensor([self.weights[i] for i in rows])).sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total


def nlls(model: nn.Module, examples: Sequence[Example], *, temperature: float = 1.0) -> Tensor:
    """`row_nlls`; of a model that is cut up each process runs its share of the rows, and all know all numbers.

    There a process has the gradient of its own rows alone: FSDP adds them up. One that has none keeps the others company.
    """
    if not is_sharded(model):
        return row_nlls(model, examples, temperature=temperature)
    rank, world = turn()
    own = list(range(rank, len(examples), world))
    found_B = row_nlls(model, [examples[i] for i in own or [-1]], temperature=temperature)
    all_B, places_B = found_B.new_zeros(len(examples)), torch.tensor(own, dtype=torch.long, device=found_B.device)
    all_B[places_B] = found_B.detach()[: len(own)]
    dist.all_reduce(all_B)
    return all_B.index_copy(0, places_B, found_B) if own else all_B + 0 * found_B.sum()


def parts(examples: Sequence[Example], batch_size: int) -> list[list[list[int]]]:
    """The batches of a pass in PARTS shares, each of which is summed on its own."""
    batches = [*by_length(examples, batch_size, key=lambda e: len(e.prompt) + len(e.response))]
    return [batches[n::PARTS] for n in range(PARTS)]


def advantages(rewards: ArrayLike) -> Array:
    """Reward minus the mean reward of the other responses to the same prompt; every row sums to 0.

    The leave-one-out baseline (RLOO) does not depend on the response it is subtracted for, so that the policy gradient
    stays unbiased.

    Args:
        rewards: shape (prompts, n), n >= 2.

    >>> advantages([[1.0, 0.0, 2.0]])
    array([[ 0. , -1.5,  1.5]])
    """
    r = np.asarray(rewards, dtype=np.float64)
    if r.ndim != 2 or r.shape[1] < 2 or not np.isfinite(r).all():
        raise ValueError(f"advantages: expected finite rewards of shape (prompts, n >= 2), found shape {r.shape}")
    n = r.shape[1]
    centred: Array = (r - r.mean(1, keepdims=True)) * (n / (n - 1))
    return centred


def contrast(rated: Sequence[Rated], *, batch_size: int = 8, temperature: float = 1.0) -> WeightedSet:
    """Minus the advantage-weighted log-likelihood of the responses, so that only what earns reward counts as alignment.

    F(r) = -sum_i a_i log p_r(y_i | x_i) / tokens, the advantages summing to 0 over the responses of one model to one
    prompt. So what POST says and PRE does not counts for nothing by itself; only a response better or worse than its
    siblings does. At the model that drew them the gradient is minus the policy gradient of the reward (RLOO).

    Args:
        rated: of POST, and of PRE too where the search should also know what to prefer at that end.

    Raises:
        ValueError: all responses to every prompt have the same reward.
    """
    pairs = [
        (e, a)
        for group in rated
        for e, a in zip(group.examples, advantages(group.rewards).ravel().tolist(), strict=True)
        if a != 0.0
    ]
    if not pairs:
        raise ValueError(
            "contrast: expected responses of different reward to at least one prompt, found none; "
            "draw more responses or use a finer reward"
        )
    return WeightedSet(tuple(e for e, _ in pairs), tuple(a for _, a in pairs), batch_size, temperature)


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
