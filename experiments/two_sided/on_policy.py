"""The alignment side as the reward itself: its gradient from responses drawn at the ratios where it is wanted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from counterpoise.averaging.partition import Partition
from counterpoise.averaging.resident import Objective, ResidentAverage
from counterpoise.evaluation.rewards import Rated, Reward, draw_rated
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import by_length, row_nlls
from counterpoise.ranks import shared
from counterpoise.records import Progress
from counterpoise.search.descent import Evaluate
from counterpoise.search.proxies import PARTS, parts
from counterpoise.search.sides import Slopes
from counterpoise.statistics.bootstrap import Array

LEAST_SHARE = 0.1
"""Importance weights whose effective sample size is a smaller share of the samples are refused."""


class Kept(NamedTuple):
    """Which neighbours a point of the diagonal took samples from.

    Attributes:
        point, other: t of the point whose gradient is wanted and of the one that drew the samples.
        effective: effective sample size over the number of samples, in (0, 1].
        used: False where it is below `LEAST_SHARE`.
    """

    point: float
    other: float
    effective: float
    used: bool


def effective_share(log_weights: ArrayLike) -> float:
    """(sum w)^2 / (n sum w^2) of importance weights given by their logarithms: 1 when all are equal, 1/n at worst.

    >>> round(effective_share([0.0, 0.0, -50.0, -50.0]), 6)
    0.5
    """
    w = np.asarray(log_weights, dtype=np.float64)
    w = np.exp(w - w.max())
    return float(w.sum() ** 2 / (len(w) * (w**2).sum()))


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


@dataclass
class OnPolicy:
    """Minus the mean reward, with the policy gradient: REINFORCE with a leave-one-out baseline per prompt (RLOO).

    d E[R] / d r_k = E[(R - b) d log p / d r_k], the expectation over responses of the average at r. Responses are drawn
    anew, with the same random numbers, at every point of the diagonal; a point also takes its neighbours' samples,
    weighed by p_r / mean of the p of all it takes from (the balance heuristic: unbiased, and no weight above the number
    of neighbours plus one), unless their effective sample size is below a tenth. Off the diagonal `near` draws at the
    point it is given and is the importance-weighted reward around it: smooth, with an exact gradient, and +infinity
    where the effective sample size falls below a tenth.

    Standard errors come from `groups` groups of prompts, each with its own backward pass: the cost is that of one.

    Attributes:
        partition: of the ratios; `resident` is moved while this works.
        prompts: alignment prompts of the proxy part.
        drawing: at least 2 responses a prompt and point; its temperature, above 0, is the policy's.
        batch_size: sequences at once in the gradient.
        kept: which neighbours' samples `along` used.
    """

    resident: ResidentAverage
    partition: Partition
    tokenizer: Any
    prompts: Sequence[Prompt]
    reward: Reward
    drawing: Drawing
    groups: int = 8
    batch_size: int = 8
    progress: Progress | None = None
    kept: list[Kept] = field(default_factory=list, init=False)
    fixed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        n, temperature = self.drawing.n, self.drawing.temperature
        if n < 2 or not temperature > 0:
            raise ValueError(f"on-policy: expected n >= 2 and a temperature above 0, found {n} and {temperature}")
        if not 2 <= self.groups <= len(self.prompts):
            most = len(self.prompts)
            raise ValueError(f"on-policy: expected from 2 groups to one a prompt ({most}), found {self.groups}")

    def along(self, points: Sequence[float]) -> Slopes:
        at = [np.full(len(self.partition), t) for t in points]
        pools = [self.draw(r) for r in at]
        self.kept = []
        found = []
        for s, r in enumerate(at):
            near = range(max(0, s - 1), min(len(at), s + 2))
            logs = {j: self._log_probabilities(at[j], [pools[i] for i in near]) for j in near}
            taken = []
            for position, i in enumerate(near):
                share = effective_share(logs[s][position] - logs[i][position])
                used = i == s or share >= LEAST_SHARE
                if i != s:
                    self.kept.append(Kept(float(points[s]), float(points[i]), share, used))
                if used:
                    taken.append((position, i))
            mixed = [
                np.logaddexp.reduce([logs[j][position] for _, j in taken], axis=0) - np.log(len(taken))
                for position, _ in taken
            ]
            found.append(self._grouped(r, [pools[i] for _, i in taken], mixed))
        values, gradients, errors = (np.array(column) for column in zip(*found, strict=True))
        return Slopes(np.asarray(points, dtype=np.float64), values, gradients, len(at), errors)

    def near(self, ratios: Array) -> Evaluate:
        pool = self.draw(ratios)
        [drawn] = self._log_probabilities(ratios, [pool])

        def evaluate(r: Array) -> tuple[float, Array]:
            [now] = self._log_probabilities(r, [pool])
            if effective_share(now - drawn) < LEAST_SHARE:
                return float("inf"), np.zeros(len(self.partition))
            surrogate = _Surrogate([pool], [drawn], slice(None), self.batch_size, self.drawing.temperature)
            return self.resident.loss_and_gradient(self.partition, r, surrogate.terms)

        return evaluate

    def draw(self, ratios: Array) -> Rated:
        """n responses of the average to each prompt, rewarded."""
        self.resident.set(self.partition, ratios)
        model, progress = self.resident.model, self.progress
        return draw_rated(model, self.tokenizer, self.prompts, self.reward, self.drawing, progress=progress)

    @torch.no_grad()
    def _log_probabilities(self, ratios: Array, pools: Sequence[Rated]) -> list[Array]:
        """log p of each response of each pool under the average at `ratios`."""
        self.resident.set(self.partition, ratios)
        found = []
        for pool in pools:
            logs = np.empty(len(pool.examples))
            batches = [*by_length(pool.examples, 2 * self.batch_size, key=lambda e: len(e.prompt) + len(e.response))]
            for rows, ours in zip(batches, shared(len(batches), partial(self._logs, pool, batches)), strict=True):
                logs[rows] = ours
            found.append(logs)
        return found

    def _logs(self, pool: Rated, batches: Sequence[list[int]], number: int) -> Array:
        """Those of one batch."""
        examples = [pool.examples[i] for i in batches[number]]
        nlls = row_nlls(self.resident.model, examples, temperature=self.drawing.temperature)
        found: Array = -nlls.double().cpu().numpy()
        return found

    def _grouped(self, r: Array, pools: Sequence[Rated], mixed: Sequence[Array]) -> tuple[float, Array, Array]:
        """Value, gradient and its standard error, from one backward pass a group of prompts."""
        bounds = np.linspace(0, len(self.prompts), self.groups + 1).round().astype(int) * self.drawing.n
        sizes = np.diff(bounds) / (len(self.prompts) * self.drawing.n)
        groups = [
            _Surrogate(pools, mixed, slice(first, stop), self.batch_size, self.drawing.temperature).backward
            for first, stop in itertools.pairwise(bounds)
        ]
        values, g = self.resident.losses_and_gradients(self.partition, r, groups)
        mean = sizes @ g
        error = np.sqrt((sizes**2) @ (g - mean) ** 2 * self.groups / (self.groups - 1))
        return float(sizes @ values), mean, error


class _Surrogate(NamedTuple):
    """Minus the importance-weighted mean reward of some rows: an objective whose gradient is minus the policy gradient."""

    pools: Sequence[Rated]
    mixed: Sequence[Array]
    rows: slice
    batch_size: int
    temperature: float

    @property
    def terms(self) -> list[Objective]:
        """`backward` as a sum: `Objectives`."""
        return [partial(self._run, n) for n in range(PARTS)]

    def backward(self, model: nn.Module) -> float:
        """Minus (mean w A + mean b), the gradient of its first term accumulated; w = p / mixed, A = R - b.

        b leaves the row's own draw out of every pool and is one for all of them: baselines of their own, where the pools'
        means differ, would not cancel in the mixture.
        """
        return sum(term(model) for term in self.terms)

    def _run(self, part: int, model: nn.Module) -> float:
        examples = [e for p in self.pools for e in p.examples[self.rows]]
        rewards = [p.rewards.ravel()[self.rows] for p in self.pools]
        above = [advantages(p.rewards).ravel()[self.rows] for p in self.pools]
        base = np.mean([r - a for r, a in zip(rewards, above, strict=True)], axis=0)
        plus = np.concatenate([r - base for r in rewards])
        logs = np.concatenate([m[self.rows] for m in self.mixed])
        total = -float(base.mean()) / PARTS
        for rows in parts(examples, self.batch_size)[part]:
            nlls = row_nlls(model, [examples[i] for i in rows], temperature=self.temperature)
            weights = (-nlls - nlls.new_tensor(logs[rows])).exp()
            loss = -(weights * nlls.new_tensor(plus[rows])).sum() / len(examples)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total
