"""What a model scored, item by item: one metric, and all that a panel measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from counterpoise.statistics.bootstrap import Array, interval, paired_difference, score


@dataclass(frozen=True)
class Measurement:
    """Per-item statistics, oriented so that higher is better (a negative log-likelihood is negated).

    Attributes:
        statistics: float64 of shape (items, d); see `counterpoise.statistics.bootstrap`.
        aggregate: "mean", "ratio" or "bleu".
        chance: the score of guessing; None where there is none.
        keys: sha256 of each item's content, so that two models are compared on the same items.
    """

    metric: str
    unit: str
    statistics: Array
    aggregate: str
    chance: float | None
    keys: tuple[str, ...]

    @property
    def value(self) -> float:
        """The score over all items."""
        return score(self.statistics, self.aggregate)

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `from_json` reads it back bit for bit."""
        return {**vars(self), "statistics": self.statistics.tolist(), "keys": list(self.keys)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Measurement:
        """Read what `to_json` wrote."""
        statistics = np.array(content["statistics"], dtype=np.float64)
        return cls(**{**content, "statistics": statistics, "keys": tuple(content["keys"])})


@dataclass(frozen=True)
class Scores:
    """What one model scored on one part; the first measurement of an ability is its primary one."""

    reward: Measurement
    abilities: dict[str, list[Measurement]]

    def summary(self) -> dict[str, Any]:
        """Values with 95 % intervals, as plain json."""
        return {
            "reward": interval_of(self.reward),
            "abilities": {name: {m.metric: interval_of(m) for m in ms} for name, ms in self.abilities.items()},
        }


def interval_of(m: Measurement) -> dict[str, float]:
    """Value and 95 % bootstrap interval over the items."""
    value, low, high, _ = interval(m.statistics, m.aggregate)
    return {"value": value, "low": low, "high": high}


def difference(a: Measurement, b: Measurement) -> dict[str, float]:
    """a - b with its 95 % interval and two-sided p, the items paired.

    Raises:
        ValueError: the two were not measured on the same items.
    """
    if a.keys != b.keys:
        raise ValueError(
            f"{a.metric}: expected two measurements of the same items, found {len(a.keys)} and {len(b.keys)}"
        )
    return paired_difference(a.statistics, b.statistics, a.aggregate)._asdict()
