"""Points of several training seeds against one another, items paired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from counterpoise.evaluation.results import loss_units, measurement
from counterpoise.report.comparisons import Group, MeasuredRun
from counterpoise.statistics.bootstrap import Studentised, over_runs, paired
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
    return np.mean([m.sampled for m in held], axis=0), held[0].aggregate


class Pooled(NamedTuple):
    """A difference over the items, and what it is in each run: the seeds as the sample."""

    value: float
    low: float
    high: float
    p: float
    seeds: tuple[float, ...]


def minus(runs: Sequence[MeasuredRun], name: str, other: str, ability: str, metric: str) -> Pooled:
    """Score of one point minus another's, pooled over runs, items paired."""
    return Pooled(
        *_paired(runs, name, other, ability, metric).difference(), tuple(_each(runs, name, other, ability, metric))
    )


def _paired(
    runs: Sequence[MeasuredRun], name: str, other: str, ability: str, metric: str, seed: int = 0
) -> Studentised:
    (a, aggregate), (b, _) = (statistics(runs, n, ability, metric) for n in (name, other))
    return paired(a, b, aggregate, seed=seed)


def _each(runs: Sequence[MeasuredRun], name: str, other: str, ability: str, metric: str) -> list[float]:
    return [_paired([run], name, other, ability, metric).value for run in runs]


def retention_minus(runs: Sequence[MeasuredRun], name: str, other: str, kind: str = "") -> Pooled:
    """The same in the mean over abilities, each as a share of its own loss; of a kind, over those that have both kinds."""
    floor = set().union(*(reading.floored(r.results) for r in runs))
    results = runs[0].results
    counted = {a: m for a, m in reading.counted(results, kind).items() if a not in floor}
    part = runs[0].results["points"][0]["part"]
    units = [u for r in runs if (u := loss_units(r.results, part, counted))]
    scales = [float(np.mean([u[ability] for u in units])) for ability in counted]
    parts = [_paired(runs, name, other, *key, seed=seed) for seed, key in enumerate(counted.items())]
    each = np.array([_each(runs, name, other, *key) for key in counted.items()])
    seeds = (each / np.array(scales)[:, None]).mean(0)
    return Pooled(*Studentised.mean(parts, scales).difference(), tuple(map(float, seeds)))


def told(found: Any, digits: int = 2) -> str:
    """Value and interval over items, and Student's over seeds where there are some; bold when all leave out 0."""
    if found is None:
        return "–"
    value, low, high = (number(v, digits, signed=True) for v in (found.value, found.low, found.high))
    text, clear = f"{value} [{low}, {high}]", found.low > 0 or found.high < 0
    if seeds := over_runs(getattr(found, "seeds", ())):
        low, high = (number(v, digits, signed=True) for v in (seeds.low, seeds.high))
        text, clear = f"{text}, seeds [{low}, {high}]", clear and (seeds.low > 0 or seeds.high < 0)
    return f"**{text}**" if clear else text


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's, ties by their order."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])
