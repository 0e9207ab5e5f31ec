"""A comparison's points and fronts against its MA curve, by paired bootstrap where the files hold every item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from counterpoise.evaluation.results import loss_units, measurement
from counterpoise.report.comparisons import Comparison, Group, MeasuredRun
from counterpoise.statistics.equal_reward import (
    Fronts,
    Matched,
    ModelStatistics,
    PointAndCurve,
    Statistics,
    hypervolume_gain,
    meeting,
    reward_matched,
)
from counterpoise.tables import reading
from counterpoise.tables.reading import ENDS, REFERENCE, RETENTION, PointEntry, Results


@dataclass(frozen=True)
class PointGains:
    """One point against the reference at its reward.

    Attributes:
        gains: axis -> the difference; its interval is NaN where a file does not hold every item, and the axis is absent
            where the reference does not reach the point's reward.
    """

    name: str
    group: str
    part: str
    gains: dict[str, Matched]


def matched(comparison: Comparison) -> list[PointGains]:
    """Every point that is neither PRE, POST nor of the `REFERENCE`, against the reference of its own group and run."""
    rows = []
    for group in comparison.groups:
        for part in reading.parts(group.points):
            some = [p for p in reading.measured_points(group.points, part) if p["method"] not in (*ENDS, REFERENCE)]
            for name in dict.fromkeys(p["name"] for p in some):
                gains = {a: g for a in reading.axes(group.runs[0].results) if (g := _gain(group, name, part, a))}
                rows.append(PointGains(name, group.name, part, gains))
    return rows


def method_gains(
    group: Group, method: str, part: str, axis: str = RETENTION, reference: str = REFERENCE
) -> Matched | None:
    """All points of a method, in all runs of a group, against the reference at each one's reward: their mean.

    Returns:
        None where a file lacks the items, the method has no points or the reference reaches none of their rewards.
    """
    if not (counted := _counted(group, axis)):
        return None
    pairs, sizes = [], []
    for run in group.runs:
        points = [p for p in reading.plottable(run.results, part, axis) if p["method"] == method]
        curve = _all_scored(run.results, reference_curve(run.results, part, axis, reference), counted)
        scored = _all_scored(run.results, points, counted)
        if curve is None or scored is None or len(curve) < 3:
            return None
        pairs += [PointAndCurve(s, curve) for s in scored]
        sizes.append(len(scored))
    found = reward_matched(pairs, _scales(group, part, axis)) if pairs else None
    if found is None:
        return None
    by_seed = ([v for v in some if v is not None] for some in np.split(np.array(found.by_run), np.cumsum(sizes)[:-1]))
    return found._replace(seeds=tuple(float(np.mean(some)) for some in by_seed if some))


def hypervolume_gains(comparison: Comparison, part: str) -> dict[tuple[str, str], Matched]:
    """(group, method) -> its hypervolume minus that of as many points of the reference, where that has so many.

    Without an interval (NaN) where a file does not hold every item.
    """
    found = {}
    for group in comparison.groups:
        if not (counted := _counted(group, RETENTION)):
            continue
        methods = dict.fromkeys(p["method"] for p in reading.measured_points(group.points, part))
        for method in [m for m in methods if m not in (*ENDS, REFERENCE)]:
            held = [of for run in group.runs if (of := _fronts(run, part, method, counted))]
            if held and (gain := hypervolume_gain(held, _scales(group, part, RETENTION))):
                found[group.name, method] = gain
            elif not held:
                volumes = [(reading.method_volumes(run.results, part) or {}).get(method) for run in group.runs]
                values = tuple(v.value - v.reference for v in volumes if v and v.reference is not None)
                if values:
                    found[group.name, method] = _bare(values, values)
    return found


def _fronts(run: MeasuredRun, part: str, method: str, counted: Sequence[tuple[str, str]]) -> Fronts | None:
    """None where a point lacks its items, or either method its points."""
    found = reading.plottable(run.results, part, RETENTION)
    held = []
    for wanted in ("PRE", "POST", method, REFERENCE):
        if not (scored := _all_scored(run.results, [p for p in found if p["method"] == wanted], counted)):
            return None
        held.append(scored)
    return Fronts(held[0][0], held[1][0], held[2], held[3])


def reference_curve(results: Results, part: str, axis: str, reference: str = REFERENCE) -> list[PointEntry]:
    """PRE, the reference's points and POST, in the order of their mean ratio; those with a reward and a score on `axis`."""
    place = {"PRE": 0.0, "POST": 1.0}
    found = [p for p in reading.plottable(results, part, axis) if p["method"] in (*ENDS, reference)]
    return sorted(found, key=lambda p: place.get(p["method"], p.get("mean") or 0.0))


def _gain(group: Group, name: str, part: str, axis: str) -> Matched | None:
    if not (counted := _counted(group, axis)):
        return None
    pairs, values = [], []
    for run in group.runs:
        point = next((p for p in reading.plottable(run.results, part, axis) if p["name"] == name), None)
        curve = reference_curve(run.results, part, axis)
        if point is None or not any(p["method"] == REFERENCE for p in curve):
            continue
        values.append(_value(run.results, point, curve, axis))
        if scored := _all_scored(run.results, [point, *curve], counted):
            pairs.append(PointAndCurve(scored[0], scored[1:]))
    if pairs and len(pairs) == len(values):
        return reward_matched(pairs, _scales(group, part, axis))
    known = tuple(v for v in values if v is not None)
    return _bare(tuple(values), known) if known else None


def _bare(values: tuple[float | None, ...], known: tuple[float, ...]) -> Matched:
    """Without an interval over items."""
    nan = float("nan")
    return Matched(float(np.mean(known)), nan, nan, nan, values, nan, known)


def _value(results: Results, point: PointEntry, curve: Sequence[PointEntry], axis: str) -> float | None:
    """The difference from the scores alone."""
    x = [p["reward"]["value"] - point["reward"]["value"] for p in curve]
    y = [reading.score_value(results, p, axis) - reading.score_value(results, point, axis) for p in curve]
    value, inside = meeting([x], [y])
    return float(-value[0]) if inside[0] else None


def _counted(group: Group, axis: str) -> list[tuple[str, str]]:
    """The abilities of an axis with their metrics."""
    results = group.runs[0].results
    if axis not in reading.MEANS:
        return [(axis, reading.primary(results)[axis])]
    return [(a, m) for a, m in reading.counted(results, reading.MEANS[axis]).items() if a not in group.floored]


def _all_scored(
    results: Results, points: Sequence[PointEntry], counted: Sequence[tuple[str, str]]
) -> list[ModelStatistics] | None:
    """The points with the statistics of every item; None where one lacks some."""
    scored = []
    for point in points:
        found = [measurement(results, point, *key) for key in [("reward", "reward"), *counted]]
        held = [Statistics(m.sampled, m.sampled_as) for m in found if m is not None]
        if len(held) < len(found):
            return None
        scored.append(ModelStatistics(held[0], tuple(held[1:])))
    return scored


def _scales(group: Group, part: str, axis: str) -> list[float]:
    """1 for one ability; the unit of each ability's loss, averaged over runs, for retention."""
    if axis not in reading.MEANS:
        return [1.0]
    counted = dict(_counted(group, axis))
    units = [loss_units(run.results, part, counted) for run in group.runs]
    found = [[*u.values()] for u in units if u]  # a file without items has no say
    return [float(u) for u in np.mean(found, axis=0)] if found else [1.0] * len(counted)
