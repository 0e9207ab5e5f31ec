"""The two sides of the search: what alignment and what retention lose at some ratios, and in which direction it falls.

A side is anything that can be measured on the diagonal and evaluated near a point. Three forms of the alignment side
stand behind it: imitation (`ProxySet` of POST's good responses), contrast (`WeightedSet` whose weights are advantages)
and the reward itself (`search.on_policy.OnPolicy`). Retention is imitation of PRE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from counterpoise.averaging.partition import Partition
from counterpoise.averaging.resident import Objective, ResidentAverage
from counterpoise.language.scoring import Example, by_length, response_tokens, row_nlls
from counterpoise.search.descent import Evaluate

Array = NDArray[np.float64]


class Slopes(NamedTuple):
    """A side along the diagonal.

    Attributes:
        points: t, shape (n,).
        values: the loss at ratios (t, ..., t), shape (n,).
        gradients: d loss / d r_k there, shape (n, K).
        passes: forward and backward passes over the side's data that this took.
        errors: standard errors of the gradients where they were estimated from samples, else None.
    """

    points: Array
    values: Array
    gradients: Array
    passes: int
    errors: Array | None = None


class Side(Protocol):
    """A loss over the ratios of a partition."""

    @property
    def fixed(self) -> bool:
        """Whether `near` gives one and the same loss everywhere; False for one that samples anew at each point."""

    def along(self, points: Sequence[float]) -> Slopes:
        """The loss and its gradient at points of the diagonal."""

    def near(self, ratios: Array) -> Evaluate:
        """The loss and gradient as a deterministic function, to be trusted around `ratios`."""


@dataclass(frozen=True)
class Likelihood:
    """A side whose data do not change: any deterministic objective of the model."""

    resident: ResidentAverage
    partition: Partition
    objective: Objective
    fixed: bool = True

    def along(self, points: Sequence[float]) -> Slopes:
        """See `Side.along`: one pass a point."""
        found = [self._at(np.full(len(self.partition), t)) for t in points]
        return Slopes(
            np.asarray(points, dtype=np.float64),
            np.array([value for value, _ in found]),
            np.stack([gradient for _, gradient in found]),
            len(found),
        )

    def near(self, ratios: Array) -> Evaluate:
        """See `Side.near`."""
        return self._at

    def _at(self, ratios: Array) -> tuple[float, Array]:
        return self.resident.loss_and_gradient(self.partition, ratios, self.objective)


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

    def __post_init__(self) -> None:
        if len(self.examples) != len(self.weights) or not self.examples:
            raise ValueError(
                f"expected one weight an example and at least one, found {len(self.weights)} weights "
                f"and {len(self.examples)} examples"
            )

    def backward(self, model: nn.Module) -> float:
        """The objective, its gradient accumulated in the parameters: an `Objective`."""
        tokens, total = response_tokens(self.examples), 0.0
        for rows in by_length(self.examples, self.batch_size, key=lambda e: len(e.prompt) + len(e.response)):
            nlls = row_nlls(model, [self.examples[i] for i in rows], temperature=self.temperature)
            loss = (nlls * nlls.new_tensor([self.weights[i] for i in rows])).sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total


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


@dataclass(frozen=True)
class Scale:
    """Makes a side 0 at the end that it is about and 1 at the other: (loss - best) / gap."""

    best: float
    gap: float

    @classmethod
    def between(cls, best: float, other: float, name: str) -> Scale:
        """From the loss at the end a side is about (POST for alignment, PRE for retention) and at the other end."""
        if not other > best:
            raise ValueError(
                f"{name}: expected a loss that {'falls' if name == 'alignment' else 'rises'} from PRE to POST, found "
                f"{other if name == 'alignment' else best:.4g} and {best if name == 'alignment' else other:.4g}; "
                "this side has nothing to keep: leave it out or give it more data"
            )
        return cls(float(best), float(other - best))

    def of(self, evaluate: Evaluate) -> Callable[[Array], tuple[float, Array]]:
        """`evaluate`, scaled."""

        def scaled(ratios: Array) -> tuple[float, Array]:
            value, gradient = evaluate(ratios)
            return (value - self.best) / self.gap, gradient / self.gap

        return scaled
