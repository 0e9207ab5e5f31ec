"""Reading a results dict (restore.json): its points, its abilities, which layer has which ratio. Absent keys are empty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from counterpoise.statistics.front import areas, front

Results = Mapping[str, Any]
PointEntry = Mapping[str, Any]

VALIDATION, HELD_OUT = "validation", "held-out"
RETENTION = "retention"
ENDS = ("PRE", "POST")
KINDS = ("likelihood", "accuracy")
"""Of metrics: how likely right answers are, and whether answers are right (or how good: BLEU)."""
MEANS = {RETENTION: "", **{f"{RETENTION} by {kind}": kind for kind in KINDS}}
"""Axis -> kind of its metrics: "" the primary ones of all abilities, else one kind, of the abilities measured both ways."""
OWN_LOSS = "share of own loss"
"""The unit of retention since commit 5f31904."""
REFERENCE = "MA"
"""The method that every other is compared with: all layers averaged alike."""


@dataclass(frozen=True)
class Share:
    """One block and the share of the update it keeps.

    Attributes:
        layers: the layers it touches; () when unknown.
        parameters: how many; None when unknown.
    """

    block: str
    ratio: float
    layers: tuple[int, ...] = ()
    parameters: int | None = None


def parts(results: Results) -> list[str]:
    """The parts that have points, validation first."""
    found = {p.get("part", VALIDATION) for p in results.get("points") or ()}
    return [part for part in (VALIDATION, HELD_OUT) if part in found]


def measured_points(results: Results, part: str = VALIDATION) -> list[PointEntry]:
    """The points measured on a part, in the order of the file."""
    return [p for p in results.get("points") or () if p.get("part", VALIDATION) == part]


def picked(results: Results) -> PointEntry | None:
    """The pick as measured on validation data."""
    name = results.get("pick")
    return next((p for p in measured_points(results) if name is not None and p["name"] == name), None)


def known(found: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A score, or None when its value was not measured or is not a finite number."""
    value = (found or {}).get("value")
    return found if value is not None and math.isfinite(value) else None


def standard_error(score: Mapping[str, Any]) -> float:
    """From the half width of a 95 % interval; 0 without one."""
    low, high = score.get("low"), score.get("high")
    return 0.0 if low is None or high is None else (high - low) / (2 * 1.96)


def tax_unit(row: Mapping[str, Any]) -> float:
    """The unit of an ability's loss, from its tax row: the tax, or two standard errors of it where it is less."""
    held = row.get("unit_of_loss")  # files of before there were units have the interval alone
    return float(held or max(abs(row["tax"]["value"]), 2 * standard_error(row["tax"])) or 1.0)


def counted_taxes(results: Results) -> list[Mapping[str, Any]]:
    """The first tax row of each ability that is not at floor; the last one first."""
    rows = results.get("tax") or ()
    first = {r["name"]: r for r in reversed(rows) if r["name"] != "reward" and not r.get("at_floor")}
    return [r for r in first.values() if known(r.get("tax"))]


def plottable(results: Results, part: str, axis: str) -> list[PointEntry]:
    """The points of a part that have both a reward and a score on `axis`."""
    return [p for p in measured_points(results, part) if known(p.get("reward")) and axis_score(results, p, axis)]


def primary(results: Results) -> dict[str, str]:
    """Ability -> its primary metric, the first one it lists."""
    found: dict[str, str] = {}
    for point in results.get("points") or ():
        for ability, metrics in (point.get("abilities") or {}).items():
            if metrics:
                found.setdefault(ability, next(iter(metrics)))
    return found


def kind_of(unit: str) -> str:
    """Which of the `KINDS` a metric is, by its unit.

    >>> kind_of("nats/token"), kind_of("%"), kind_of("BLEU")
    ('likelihood', 'accuracy', 'accuracy')
    """
    return KINDS[not unit.startswith("nats")]


def counted(results: Results, kind: str = "") -> dict[str, str]:
    """Each ability that is not at floor, with its primary metric; or of those measured both ways the first of a kind."""
    floor = floored(results)
    if not kind:
        return {a: m for a, m in primary(results).items() if a not in floor}
    found: dict[str, dict[str, str]] = {}
    for row in results.get("tax") or ():
        found.setdefault(row["name"], {}).setdefault(kind_of(str(row.get("unit") or "")), row["metric"])
    return {name: of[kind] for name, of in found.items() if len(of) == len(KINDS) and name not in floor}


def is_old(results: Results) -> bool:
    """Whether a file that was read holds retention in another unit than today's."""
    return bool(results.get("retention_unit", OWN_LOSS) != OWN_LOSS)


def unit(results: Results, ability: str) -> str:
    """Unit of an ability's primary metric, from the tax rows; "" when unknown."""
    return next((str(r.get("unit") or "") for r in results.get("tax") or () if r["name"] == ability), "")


def floored(results: Results) -> set[str]:
    """Abilities at floor, which the mean leaves out: on validation data where that is recorded, else by the tax table."""
    if (found := results.get("floored")) is not None:
        return set(found)
    return {r["name"] for r in results.get("tax") or () if r.get("at_floor")}


def axis_score(results: Results, point: PointEntry, axis: str) -> Mapping[str, Any] | None:
    """Retention, or the primary metric of the ability `axis`, with its interval; None when it is not `known`."""
    if axis in MEANS:
        return known(retained(point, axis))
    return known(ability_score(point, axis, primary(results).get(axis, "")))


def retained(point: PointEntry, axis: str) -> Mapping[str, Any] | None:
    """Retention on one of the `MEANS`; None where it was not measured."""
    found: Mapping[str, Any] = point.get("retention_by") or {}
    return found.get(kind) if (kind := MEANS[axis]) else point.get(RETENTION)


def ability_score(point: PointEntry, ability: str, metric: str) -> Mapping[str, Any] | None:
    """A metric of an ability; None where it was not measured."""
    found: Mapping[str, Any] | None = ((point.get("abilities") or {}).get(ability) or {}).get(metric)
    return found


def axes(results: Results) -> list[str]:
    """What the horizontal axis of the front can show: retention, also by either kind, where measured; each ability."""
    points = results.get("points") or ()
    return [*(a for a in MEANS if any(known(retained(p, a)) for p in points)), *primary(results)]


def axis_label(results: Results, axis: str, retention: str = RETENTION) -> str:
    """An ability with its primary metric, and whether it is at floor; `retention` for that axis, and what it is by."""
    if axis in MEANS:
        return (retention if axis == RETENTION else axis) + (", older unit" if is_old(results) else "")
    floor = ", at floor" if axis in floored(results) else ""
    return f"{axis} ({primary(results)[axis]}{floor})"


def version_list(content: Results) -> str:
    """What a file was made with, as "python 3.12, torch 2.9"."""
    return ", ".join(f"{k} {v}" for k, v in (content.get("versions") or {}).items())


def undominated(results: Results, found: Sequence[PointEntry], axis: str) -> list[PointEntry]:
    """The points of `found` (all `plottable`) that no other beats in both reward and `axis`, from the least reward up."""
    if not found:
        return []
    kept = front([[p["reward"]["value"], score_value(results, p, axis)] for p in found])
    return sorted((found[i] for i in kept), key=lambda p: (p["reward"]["value"], -score_value(results, p, axis)))


def score_value(results: Results, point: PointEntry, axis: str) -> float:
    """The bare value of `axis_score`; NaN when it was not measured."""
    found = axis_score(results, point, axis)
    return float(found["value"]) if found else float("nan")


class Volume(NamedTuple):
    """Area under a method's front, and the reference's with as many points, the mean over all choices; None with fewer."""

    value: float
    reference: float | None


def method_volumes(results: Results, part: str = VALIDATION) -> dict[str, Volume] | None:
    """The area between each method's front (with PRE and POST) and the corner of PRE's reward and POST's retention.

    Scaled so that the rectangle spanned by PRE and POST is 1; points beyond it count. None where they span none.
    """
    found = plottable(results, part, RETENTION)
    at: dict[str, list[tuple[float, float]]] = {}
    for p in found:
        at.setdefault(p["method"], []).append((p["reward"]["value"], p["retention"]["value"]))
    if not all(end in at for end in ENDS):
        return None
    (least, most), (high, low) = (at.pop(end)[-1] for end in ENDS)
    if min(high - least, most - low) <= 0:
        return None

    def area(name: str, of: int | None = None) -> float:
        x, y = np.transpose(at[name])
        return float(areas([(x - least) / (high - least)], [(y - low) / (most - low)], of)[0])

    known_to = len(at.get(REFERENCE, ()))
    return {
        m: Volume(area(m), area(REFERENCE, n) if n <= known_to else None)
        for m, n in ((m, len(points)) for m, points in at.items())
    }


def needed_reward(results: Results, part: str = VALIDATION) -> float | None:
    """The least reward the pick may have: pre + keep_reward (post - pre); None when nothing was asked for."""
    keep = (results.get("settings") or {}).get("keep_reward")
    found = [p for p in measured_points(results, part) if p["method"] in ENDS and known(p.get("reward"))]
    ends = {p["method"]: p["reward"]["value"] for p in found}
    if keep is None or len(ends) < 2 or (results.get("settings") or {}).get("mean") is not None:
        return None
    return float(ends["PRE"] + keep * (ends["POST"] - ends["PRE"]))


def layers(partition: Mapping[str, Any]) -> list[int]:
    """All layers of a partition, from input to output."""
    return sorted({n for b in partition.get("blocks") or () for n in b.get("layers") or ()})


def block_shares(partition: Mapping[str, Any], ratios: Sequence[float], name: str | None = None) -> list[Share]:
    """What each block keeps, for ratios of this partition, of one block, or of one block a layer.

    Args:
        partition: the summary in a results file or recipe.
        name: of the partition that the ratios belong to, when it is known and may be another.
    """
    blocks, every = partition.get("blocks") or [], layers(partition)
    if len(ratios) == len(blocks) and name in (None, partition.get("name")):
        return [
            Share(b["name"], r, tuple(b.get("layers") or ()), b.get("parameters"))
            for b, r in zip(blocks, ratios, strict=True)
        ]
    if len(ratios) == 1:
        return [Share("all layers", ratios[0], tuple(every))]
    if len(ratios) == len(every):
        return [Share(f"layer {n}", r, (n,)) for n, r in zip(every, ratios, strict=True)]
    return [Share(f"block {i + 1}", r) for i, r in enumerate(ratios)]


def point_partition(results: Results, point: PointEntry) -> Mapping[str, Any]:
    """The summary of the partition that a point's ratios belong to: the run's own, or that of its two-sided search."""
    other = (results.get("two_sided") or {}).get("partition") or {}
    return other if other and other.get("name") == point.get("blocks") else results.get("partition") or {}


def point_shares(results: Results, point: PointEntry) -> list[Share]:
    """What each block keeps at a point."""
    return block_shares(point_partition(results, point), point.get("ratios") or [], point.get("blocks"))


def by_layer(found: Sequence[Share]) -> dict[int, float] | None:
    """Layer -> ratio; None where blocks share layers (by module) or have none."""
    flat = [(n, s.ratio) for s in found for n in s.layers]
    of = dict(flat)
    return dict(sorted(of.items())) if flat and len(of) == len(flat) else None
