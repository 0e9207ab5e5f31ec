"""Result files that can share a figure, and their points pooled over runs that differ in the seed alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from counterpoise.checkpoints.reading import parse_json, read_text
from counterpoise.evaluation.results import measurement, with_retention
from counterpoise.statistics.bootstrap import interval
from counterpoise.tables import reading
from counterpoise.tables.reading import ENDS, OWN_LOSS, RETENTION, PointEntry, Results
from counterpoise.tables.shape import check_results

OLD_UNIT = "number in the unit of an older version, up to commit 5f31904 standard errors at PRE"


@dataclass(frozen=True)
class MeasuredRun:
    """One training run: the points of one or several files.

    Attributes:
        files: their names.
    """

    files: tuple[str, ...]
    seed: Any
    results: Results


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone; their points are pooled by name."""

    name: str
    runs: tuple[MeasuredRun, ...]

    @property
    def points(self) -> Results:
        """Those of all its runs, as one results dict."""
        return {"points": [point for run in self.runs for point in run.results["points"]]}

    @property
    def floored(self) -> set[str]:
        """Abilities at floor in any of the runs: left out in all where methods are compared."""
        return set().union(*(reading.floored(run.results) for run in self.runs))


@dataclass(frozen=True)
class Comparison:
    """What shares a figure: groups scored by one reward and the same abilities.

    Attributes:
        notes: what a reader should know about which files are here.
    """

    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()

    @property
    def runs(self) -> list[MeasuredRun]:
        """The runs of all groups, group after group."""
        return [run for group in self.groups for run in group.runs]

    @property
    def reward(self) -> str | None:
        """The reward's name, from the first file that gives one."""
        return next((str(r.results["reward"]) for r in self.runs if r.results.get("reward")), None)


def read_comparisons(paths: Sequence[str | Path]) -> list[Comparison]:
    """Read result files (restore.json, or any json with `points`) and sort them into comparisons.

    Files that name a `run` are joined when run and seed are equal and pooled over seeds; others are pooled when their
    commands differ in --seed alone.

    Files that count another metric or another unit of retention are in comparisons of their own; a note says so.

    Raises:
        ValueError: no files, one that is no json, or one without points.
    """
    if not paths:
        raise ValueError("front: expected at least one result file")
    by_signature: dict[tuple[Any, ...], dict[str, Results]] = {}
    for path, label in zip(paths, _labels(paths), strict=True):
        content = read_results(path)
        by_signature.setdefault(_signature(content), {})[label] = content
    return [Comparison(tuple(_groups(files)), _apart(s, by_signature)) for s, files in by_signature.items()]


def pooled(comparison: Comparison) -> dict[str, Any]:
    """A comparison as one results dict: every point pooled over the runs of its group.

    Where there are several groups, name and method tell which; `kind` is the bare method and `group` the group.

    The value is the mean over runs. Its interval is over items, for these runs: from the mean of each item's statistics
    where all runs hold them for the same items, else the mean of the runs' intervals, which is too wide rather than too
    narrow.
    """
    points: list[dict[str, Any]] = []
    many = len(comparison.groups) > 1
    for group in comparison.groups:
        found: dict[tuple[str, str], list[tuple[Results, PointEntry]]] = {}
        for run in group.runs:
            for point in run.results["points"]:
                key = (point.get("part", reading.VALIDATION), point["name"])
                found.setdefault(key, []).append((run.results, point))
        for (part, name), some in found.items():
            kind = some[0][1]["method"]
            if kind == "PRE" and any(p["name"] == name and p["part"] == part for p in points):
                continue  # one PRE for all groups
            label = f"{name} ({group.name})" if many and kind != "PRE" else name
            method = f"{kind} ({group.name})" if many and kind not in ENDS else kind
            of = {"name": label, "method": method, "part": part, "group": group.name, "kind": kind}
            points.append({**_pool(some), **of})
    first = comparison.runs[0].results
    pick = first.get("pick") if len(comparison.runs) == 1 else None
    about = {key: first.get(key) for key in ("tax", "retention_unit")}
    return {"points": points, **about, "reward": comparison.reward, "pick": pick}


def beaten_by(results: Results, point: PointEntry, axis: str = RETENTION) -> list[str]:
    """Names of the points of the same part that are at least as good in reward and on `axis`, and better in one."""
    part = point.get("part", reading.VALIDATION)
    if not reading.known(point.get("reward")):
        return []
    here = point["reward"]["value"], reading.score_value(results, point, axis)
    names = []
    for other in reading.plottable(results, part, axis):
        there = other["reward"]["value"], reading.score_value(results, other, axis)
        if there != here and there[0] >= here[0] and there[1] >= here[1]:
            names.append(str(other["name"]))
    return names


def _pool(some: Sequence[tuple[Results, PointEntry]]) -> dict[str, Any]:
    first = some[0][1]
    abilities = (first.get("abilities") or {}).items()
    return {
        "ratios": first.get("ratios") or [],
        "mean": first.get("mean"),
        "runs": len(some),
        "reward": _pool_score(some, "reward"),
        "abilities": {name: {metric: _pool_score(some, name, metric) for metric in found} for name, found in abilities},
        "retention": _pool_score(some, RETENTION),
        "retention_by": {kind: _pool_score(some, axis) for axis, kind in reading.MEANS.items() if kind},
    }


def _pool_score(
    some: Sequence[tuple[Results, PointEntry]], name: str, metric: str | None = None
) -> dict[str, Any] | None:
    """Reward, retention (by either kind too), or a metric of an ability; None where a run lacks it."""
    if metric is not None:
        found = [reading.ability_score(p, name, metric) for _, p in some]
    else:
        found = [p.get(name) if name == "reward" else reading.retained(p, name) for _, p in some]
    known = [dict(s) for s in found if s is not None and reading.known(s)]
    if len(known) < len(some):
        return None
    if len(known) == 1:
        return known[0]
    values = [float(s["value"]) for s in known]
    value = float(np.mean(values))
    low = high = None
    held = [m for r, p in some if (m := measurement(r, p, name, metric or name)) is not None]
    if len(held) == len(some) and len({(m.keys, m.groups) for m in held}) == 1:
        of = interval(np.mean([m.sampled for m in held], axis=0), held[0].sampled_as)
        low, high = value + of.low - of.value, value + of.high - of.value
    elif all(s.get("low") is not None and s.get("high") is not None for s in known):
        low, high = (float(np.mean([s[k] for s in known])) for k in ("low", "high"))
    return {"value": value, "low": low, "high": high, "runs": values}


def _groups(files: Mapping[str, Results]) -> list[Group]:
    runs: dict[Any, dict[str, Results]] = {}
    for label, content in files.items():
        key = (content["run"], content.get("seed")) if content.get("run") else label
        runs.setdefault(key, {})[label] = content
    groups: dict[tuple[str, Any], list[MeasuredRun]] = {}
    for members in runs.values():
        (first, content), *others = members.items()
        for label, other in others:
            content = _joined(content, other, label)
        run = MeasuredRun(tuple(members), content.get("seed"), content)
        command = re.sub(r"--seed[ =]\S+", "", str(content.get("command") or first))
        group = ("run", content["run"]) if content.get("run") else ("command", command)
        taken = [r.seed for r in groups.get(group, [])]
        groups.setdefault(group if run.seed not in taken else ("file", first), []).append(run)
    found = []
    for (kind, name), seeds in groups.items():
        more = f" and {len(seeds) - 1} more seeds" if len(seeds) > 1 else ""
        found.append(Group(str(name) if kind == "run" else seeds[0].files[0] + more, tuple(seeds)))
    return found


def _joined(first: Results, second: Results, label: str) -> Results:
    """Two files of one run and seed: their points together; those in both must be the same."""
    have = {(p.get("part"), p["name"]): p for p in first["points"]}
    new = []
    for point in second["points"]:
        known = have.get((point.get("part"), point["name"]))
        if known is None:
            new.append(point)
        elif known.get("reward") != point.get("reward"):
            raise ValueError(
                f"{label}: {point['name']} of run {second.get('run')!r}, seed {second.get('seed')}, has another reward than "
                "in the file before it; one of the two is stale"
            )
    for part, items in (second.get("items") or {}).items():
        if new and items != (first.get("items") or {}).get(part):
            run = f"{label}: run {second.get('run')!r}"
            raise ValueError(f"{run} was measured on other items than in the file before it")
    return {**first, "points": [*first["points"], *new], "pick": first.get("pick")}


def _signature(content: Results) -> tuple[Any, ...]:
    return content.get("reward"), tuple(sorted(reading.primary(content).items())), content["retention_unit"]


def _apart(signature: tuple[Any, ...], others: Mapping[tuple[Any, ...], Iterable[str]]) -> tuple[str, ...]:
    """Why files of one reward and the same abilities are not on one front."""
    reward, metrics, unit = signature
    notes = []
    for (theirs, other, measured_in), labels in others.items():
        if (theirs, dict(other).keys()) != (reward, dict(metrics).keys()) or (other, measured_in) == (metrics, unit):
            continue
        differ = [f"{a} by {m}, they by {dict(other)[a]}" for a, m in metrics if dict(other)[a] != m]
        why = f"it counts {'; '.join(differ)}" if differ else f"its retention is a {unit}, theirs a {measured_in}"
        notes.append(f"not on one front with {', '.join(labels)}: {why}")
    return tuple(notes)


def read_results(path: str | Path) -> dict[str, Any]:
    """A results file of this or an earlier version, with the retention of today where it holds items.

    Raises:
        ValueError: no json, or no results.
    """
    content = parse_json(read_text(path), str(path))
    found = content.get("points") if isinstance(content, dict) else f"a {type(content).__name__}"
    if not isinstance(content, dict) or not found:
        raise ValueError(f"{path}: expected a result file with points, found {found or 'none'}")
    check_results(content, str(path))
    if content.get("items"):
        return with_retention(content)
    measured = any(reading.known(p.get(RETENTION)) for p in content["points"])
    return {**content, "retention_unit": content.get("retention_unit") or OLD_UNIT if measured else OWN_LOSS}


def _labels(paths: Sequence[str | Path]) -> list[str]:
    """File names without .json; with their folder, or whole, where the shorter names are equal or say nothing."""
    stems = [Path(p).stem for p in paths]
    short = [
        s if stems.count(s) == 1 and s not in ("restore", "results") else f"{Path(p).absolute().parent.name}/{s}"
        for p, s in zip(paths, stems, strict=True)
    ]
    return [s if short.count(s) == 1 else str(p) for p, s in zip(paths, short, strict=True)]
