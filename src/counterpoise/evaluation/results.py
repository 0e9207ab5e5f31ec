"""A results file: points with their intervals, and the statistics of every item, so that files can be compared in pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from counterpoise.evaluation.measurement import (
    Measurement,
    Scores,
    above_floor,
    retention_of,
    retentions,
    tax_table,
    unit_of,
)
from counterpoise.records import write_whole
from counterpoise.tables.reading import MEANS, OWN_LOSS, counted

DIGITS, KEY_LENGTH = 8, 16  # of a statistic, of an item's key: enough for every score shown, a third of the bytes


class Measured(NamedTuple):
    """One model and what it scored.

    Attributes:
        name: unique within the file and the same in the files of other seeds ("L2 0.04").
        method: what shares a colour ("L2"); "PRE", "POST" and "MA" are known to the page.
        ratios, mean: of an average; empty and None otherwise.
        settings: whatever else made it.
    """

    name: str
    method: str
    scores: Scores
    ratios: tuple[float, ...] = ()
    mean: float | None = None
    settings: Mapping[str, Any] = {}


def results(
    points: Sequence[Measured],
    *,
    run: str,
    seed: int,
    reward: str,
    part: str = "held-out",
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One run's results as plain json, in the format of restore.json, with the statistics of every item.

    Files of the same `run` are pooled over their seeds, and files of the same run and seed are joined, by
    `counterpoise front`.

    Args:
        points: the first one PRE and the second one POST, all measured on the same items of one part.
        run: what was aligned and how, without the seed ("rsf").
        reward: the reward's name; only files of one reward are drawn together.
        about: what else to record: command, commit, versions, settings.

    Raises:
        ValueError: PRE or POST missing or out of place, a name twice, other items in one of the points.
    """
    _check(points)
    pre, post = points[0].scores, points[1].scores
    kept = retentions(pre, post, [p.scores for p in points], above_floor(pre))
    rows = [
        {
            "name": p.name,
            "method": p.method,
            "part": part,
            "mean": p.mean,
            "ratios": list(p.ratios),
            "settings": dict(p.settings),
            **p.scores.summary(),
            **of,
            "statistics": statistics_of(p.scores),
        }
        for p, of in zip(points, kept, strict=True)
    ]
    return {
        **(about or {}),
        "run": run,
        "seed": seed,
        "reward": reward,
        "retention_unit": OWN_LOSS,
        "points": rows,
        "items": {part: items_of(pre)},
        "tax": tax_table(pre, post),
    }


def statistics_of(scores: Scores) -> dict[str, Any]:
    """Every item's statistics, for a point of a results file: reward or ability -> metric -> one entry an item."""
    return {n: {m.metric: _rows(m) for m in ms} for n, ms in _all(scores).items()}


def items_of(scores: Scores) -> dict[str, Any]:
    """What these items are, once for all points of a part: reward or ability -> metric -> keys, aggregate, unit, chance."""

    def about(m: Measurement) -> dict[str, Any]:
        return {"aggregate": m.aggregate, "unit": m.unit, "chance": m.chance, "keys": [k[:KEY_LENGTH] for k in m.keys]}

    return {name: {m.metric: about(m) for m in measurements} for name, measurements in _all(scores).items()}


def write_results(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write what `results` made, whole or not at all; one line a point, so that version control shows what changed."""
    lines = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in content.items() if k != "points"]
    rows = ",\n  ".join(json.dumps(p, ensure_ascii=False) for p in content["points"])
    write_whole(Path(path), "{\n " + ",\n ".join([*lines, f'"points": [\n  {rows}\n ]']) + "\n}\n")


def measurement(content: Mapping[str, Any], point: Mapping[str, Any], name: str, metric: str) -> Measurement | None:
    """The item by item measurement of a point, "reward" or an ability; None when the file does not hold it."""
    about = (((content.get("items") or {}).get(point.get("part")) or {}).get(name) or {}).get(metric)
    values = ((point.get("statistics") or {}).get(name) or {}).get(metric)
    if about is None or values is None:
        return None
    statistics = np.array(values, dtype=np.float64)
    statistics = statistics[:, None] if statistics.ndim == 1 else statistics
    return Measurement(metric, about["unit"], statistics, about["aggregate"], about["chance"], tuple(about["keys"]))


def loss_units(content: Mapping[str, Any], part: str, metrics: Mapping[str, str]) -> dict[str, float] | None:
    """`measurement.unit_of` abilities by these metrics, from PRE's and POST's items; None when the file does not hold them."""
    at = {p["method"]: p for p in content["points"] if p.get("part") == part}
    pairs = _pairs(content, at.get("PRE", {}), at.get("POST", {}), metrics)
    return {name: unit_of(*pair) for name, pair in pairs.items()} if pairs else None


def with_retention(content: Mapping[str, Any]) -> dict[str, Any]:
    """A results file whose points have the retention of today, from their items; None where they hold none."""
    pres = {p.get("part"): p for p in content["points"] if p["method"] == "PRE"}
    sides = {kind: counted(content, kind) for kind in MEANS.values()}
    units = {(part, kind): loss_units(content, str(part), of) for part in pres for kind, of in sides.items()}

    def kept(point: Mapping[str, Any], kind: str = "") -> dict[str, Any] | None:
        part = point.get("part")
        pairs = _pairs(content, pres.get(part, {}), point, sides[kind])
        return retention_of(pairs, unit) if pairs and (unit := units.get((part, kind))) else None

    rows = [{**p, "retention": kept(p), "retention_by": {k: kept(p, k) for k in sides if k}} for p in content["points"]]
    return {**content, "retention_unit": OWN_LOSS, "points": rows}


def _pairs(
    content: Mapping[str, Any], pre: Mapping[str, Any], point: Mapping[str, Any], metrics: Mapping[str, str]
) -> dict[str, tuple[Measurement, Measurement]] | None:
    """Each ability as PRE and as the point has it; None where one is missing, or nothing is counted."""
    held = {n: (measurement(content, pre, n, m), measurement(content, point, n, m)) for n, m in metrics.items()}
    found = {n: (a, b) for n, (a, b) in held.items() if a is not None and b is not None}
    return found if found and len(found) == len(held) else None


def _all(scores: Scores) -> dict[str, list[Measurement]]:
    return {"reward": [scores.reward], **scores.abilities}


def _rows(m: Measurement) -> list[Any]:
    rounded = [[float(f"{v:.{DIGITS}g}") for v in row] for row in m.statistics.tolist()]
    return [row[0] for row in rounded] if m.statistics.shape[1] == 1 else rounded


def _check(points: Sequence[Measured]) -> None:
    if [p.method for p in points[:2]] != ["PRE", "POST"]:
        raise ValueError(
            f"results: expected PRE and POST as the first two points, found {[p.method for p in points[:2]]}"
        )
    names = [p.name for p in points]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"results: expected each name once, found {twice[0]!r} twice")
    wanted = {n: [(m.metric, m.keys) for m in ms] for n, ms in _all(points[0].scores).items()}
    for p in points[1:]:
        found = {n: [(m.metric, m.keys) for m in ms] for n, ms in _all(p.scores).items()}
        if found != wanted:
            other = next(n for n in {**wanted, **found} if found.get(n) != wanted.get(n))
            raise ValueError(
                f"results: expected all points measured on the same items, but {p.name}'s {other} is not PRE's"
            )
