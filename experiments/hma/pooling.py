"""Points of several training seeds against one another, items paired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from counterpoise.evaluation.results import loss_units, measurement
from counterpoise.report.comparisons import Group, MeasuredRun
from counterpoise.statistics.bootstrap import Difference, Studentised, paired, paired_difference
from counterpoise.tables import reading
from counterpoise.tables.numbers import number

Point = dict[str, Any]


def of(run: MeasuredRun, name: str) -> Point | None:
    """A point by its name."""
    return next((p for p in run.results["points"] if p["name"] == name), None)


def shared(group: Group, names: Sequence[str]) -> list[MeasuredRun]:
    """The runs that have all of these points."""
    return [r for r in group.runs if all(of(r, n) is not None for n in names)]


def statistics(runs: Sequence[MeasuredRun], name: str, ability: str, metric: str) -> tuple[Any, str]:
    """Every item's statistics, the mean over runs, and how they become a score."""
    found = [measurement(r.results, p, ability, metric) for r in runs if (p := of(r, name))]
    held = [m for m in found if m is not None]
    if len(held) < len(runs) or len({m.keys for m in held}) > 1:
        raise ValueError(f"{name}, {ability}: expected the same items in {len(runs)} runs; were they measured alike?")
    return np.mean([m.statistics for m in held], axis=0), held[0].aggregate


def minus(runs: Sequence[MeasuredRun], name: str, other: str, ability: str, metric: str) -> Difference:
    """Score of one point minus another's, pooled over runs, items paired."""
    (a, aggregate), (b, _) = (statistics(runs, n, ability, metric) for n in (name, other))
    return paired_difference(a, b, aggregate)


def retention_minus(runs: Sequence[MeasuredRun], name: str, other: str, kind: str = "") -> Difference:
    """The same in the mean over abilities, each as a share of its own loss; of a kind, over those that have both kinds."""
    floor = set().union(*(reading.floored(r.results) for r in runs))
    results = runs[0].results
    counted = {a: m for a, m in reading.counted(results, kind).items() if a not in floor}
    part = runs[0].results["points"][0]["part"]
    units = [u for r in runs if (u := loss_units(r.results, part, counted))]
    parts = []
    for seed, key in enumerate(counted.items()):
        (a, aggregate), (b, _) = (statistics(runs, n, *key) for n in (name, other))
        parts.append(paired(a, b, aggregate, seed=seed))
    return Studentised.mean(parts, [float(np.mean([u[name] for u in units])) for name in counted]).difference()


def told(found: Any, digits: int = 2) -> str:
    """Value and interval; bold when it leaves out 0."""
    if found is None:
        return "–"
    value, low, high = (number(v, digits, signed=True) for v in (found.value, found.low, found.high))
    text = f"{value} [{low}, {high}]"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's, ties by their order."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])
