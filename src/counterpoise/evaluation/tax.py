"""The tax: what a second model scores against a first, row by row, and in one number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from counterpoise.evaluation.measurement import Measurement, Scores, difference, interval_of
from counterpoise.statistics.bootstrap import interval, paired_replicates


def at_floor(measurements: Sequence[Measurement]) -> bool:
    """Whether PRE's ability is not significantly above chance: nothing is there to be lost.

    It is if some metric that has a chance level does not clear it with its 95 % interval.
    """
    return any(m.chance is not None and interval(m.statistics, m.aggregate)[1] <= m.chance for m in measurements)


def above_floor(pre: Scores) -> list[str]:
    """The abilities that count: those that PRE has; see `at_floor`."""
    return [name for name, measurements in pre.abilities.items() if not at_floor(measurements)]


def tax_table(pre: Scores, post: Scores, pick: Scores | None = None) -> list[dict[str, Any]]:
    """Rows of reward and of every metric of every ability: PRE, POST, the tax (PRE minus POST), and what a pick leaves."""
    rows = []
    for name in ("reward", *pre.abilities):
        floor = name != "reward" and at_floor(pre.abilities[name])
        columns = [[s.reward] if name == "reward" else s.abilities[name] for s in (pre, post, pick or pre)]
        for before, after, now in zip(*columns, strict=True):
            rows.append(
                {
                    "name": name,
                    "metric": before.metric,
                    "unit": before.unit,
                    "items": len(before.keys),
                    "pre": interval_of(before),
                    "post": interval_of(after),
                    "pick": interval_of(now) if pick else None,
                    "tax": difference(before, after),
                    "remaining": difference(before, now) if pick else None,
                    "at_floor": floor,
                }
            )
    return rows


def steps_from_pre(pre: Scores, scores: Scores, counted: Sequence[str]) -> dict[str, Any]:
    """Retention: minus the mean over `counted` abilities of tax / standard error at PRE; 0 is PRE, lower is worse."""
    values, replicates = [], []
    for number, name in enumerate(counted):
        before, now = pre.abilities[name][0], scores.abilities[name][0]
        error = interval(before.statistics, before.aggregate)[3]
        scale = error if error > 0 else 1.0
        values.append((now.value - before.value) / scale)
        replicates.append(paired_replicates(now.statistics, before.statistics, before.aggregate, seed=number) / scale)
    mean = np.mean(replicates, axis=0)
    low, high = np.quantile(mean, [0.025, 0.975])
    return {"value": float(np.mean(values)), "low": float(low), "high": float(high)}
