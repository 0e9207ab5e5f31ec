"""The two sides of the search: what alignment and what retention lose at some ratios, and in which direction it falls.

A side is anything that can be measured on the diagonal and evaluated near a point. Alignment is imitation of POST's good
responses (`ProxySet`), retention is imitation of PRE; experiments/two_sided/forms.py has other forms of alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from counterpoise.averaging.partition import Partition
from counterpoise.averaging.resident import Objectives, ResidentAverage
from counterpoise.search.descent import Evaluate
from counterpoise.statistics.bootstrap import Array


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
    """A side whose data do not change: any deterministic objective of the model, one pass a point."""

    resident: ResidentAverage
    partition: Partition
    objective: Objectives
    fixed: bool = True

    def along(self, points: Sequence[float]) -> Slopes:
        found = [self._at(np.full(len(self.partition), t)) for t in points]
        values, gradients = (np.array(column) for column in zip(*found, strict=True))
        return Slopes(np.asarray(points, dtype=np.float64), values, gradients, len(found))

    def near(self, ratios: Array) -> Evaluate:
        return self._at

    def _at(self, ratios: Array) -> tuple[float, Array]:
        return self.resident.loss_and_gradient(self.partition, ratios, self.objective)


@dataclass(frozen=True)
class Scale:
    """Makes a side 0 at the end that it is about and 1 at the other: (loss - best) / gap."""

    best: float
    gap: float

    @classmethod
    def between(cls, best: float, other: float, name: str) -> Scale:
        """From the loss at the end a side is about (POST for alignment, PRE for retention) and at the other end."""
        if not other > best:
            verb, pre, post = ("falls", other, best) if name == "alignment" else ("rises", best, other)
            raise ValueError(
                f"{name}: expected a loss that {verb} from PRE to POST, found {pre:.4g} and {post:.4g}; "
                "this side has nothing to keep: leave it out or give it more data"
            )
        return cls(float(best), float(other - best))

    def of(self, evaluate: Evaluate) -> Evaluate:
        """A loss with its gradient, scaled."""

        def scaled(ratios: Array) -> tuple[float, Array]:
            value, gradient = evaluate(ratios)
            return (value - self.best) / self.gap, gradient / self.gap

        return scaled
