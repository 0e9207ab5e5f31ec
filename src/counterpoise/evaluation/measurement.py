"""What a model scored, item by item, and the tax: what a second one scores against it, in rows and in one number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from counterpoise.evaluation.specs import bare
from counterpoise.statistics.bootstrap import (
    Array,
    Interval,
    Studentised,
    clustered,
    divided,
    interval,
    of_groups,
    paired,
    paired_difference,
    resampled_difference,
    score,
    weighted,
)
from counterpoise.statistics.paired import calibration, cells, flips
from counterpoise.tables.reading import KINDS, kind_of

BOUNDS = {"%": (0.0, 100.0), "BLEU": (0.0, 100.0)}
"""What scores of a unit cannot leave, nor their intervals."""


@dataclass(frozen=True)
class Measurement:
    """Per-item statistics, oriented so that higher is better (a negative log-likelihood is negated).

    Attributes:
        statistics: float64 of shape (items, d); see `counterpoise.statistics.bootstrap`.
        aggregate: "mean", "ratio" or "bleu", of several tasks `bootstrap.weighted`.
        chance: the score of guessing; None where there is none.
        keys: sha256 of each item's content, so that two models are compared on the same items.
        groups: the group of each item, which is resampled whole; () where each is by itself.
        subtasks: of a group of tasks, in the order of its items: the name of each, how many are its own, and its chance.
        sureness: what `statistics.paired.calibration` takes, shape (items, 3), of what is chosen by its likelihood.
    """

    metric: str
    unit: str
    statistics: Array
    aggregate: str
    chance: float | None
    keys: tuple[str, ...]
    groups: tuple[str, ...] = ()
    subtasks: tuple[tuple[str, int, float | None], ...] = ()
    sureness: Array | None = None

    @property
    def sampled(self) -> Array:
        """What is resampled: the statistics of each item, or their sums over each group; shape (items or groups, d)."""
        return clustered(self.statistics, self.groups) if self.groups else self.statistics

    @property
    def sampled_as(self) -> str:
        """The aggregate of `sampled`."""
        return of_groups(self.aggregate, self.groups) if self.groups else self.aggregate

    @property
    def value(self) -> float:
        """The score over all items."""
        return score(self.statistics, self.aggregate)

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `from_json` reads it back bit for bit."""
        sure = None if self.sureness is None else self.sureness.tolist()
        plain = {**vars(self), "statistics": self.statistics.tolist(), "keys": list(self.keys), "sureness": sure}
        return {k: v for k, v in plain.items() if v or k not in ("groups", "subtasks", "sureness")}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Measurement:
        """Read what `to_json` wrote."""
        arrays = {
            name: np.array(content[name], dtype=np.float64) for name in ("statistics", "sureness") if content.get(name)
        }
        subtasks = tuple(map(tuple, content.get("subtasks") or ()))
        listed = {name: tuple(content.get(name) or ()) for name in ("keys", "groups")}
        return cls(**{**content, **arrays, "subtasks": subtasks, **listed})

    def apart(self) -> list[tuple[str, Measurement]]:
        """Each subtask by itself."""
        made, end = list[tuple[str, Measurement]](), 0
        for name, items, chance in self.subtasks:
            cut, end = slice(end, end + items), end + items
            of: dict[str, Any] = {"statistics": self.statistics[cut], "keys": self.keys[cut]}
            of |= {} if self.sureness is None else {"sureness": self.sureness[cut]}
            base = self.aggregate.split()[0]
            groups = own if len(set(own := self.groups[cut])) < len(own) else ()
            made.append((name, replace(self, aggregate=base, chance=chance, groups=groups, subtasks=(), **of)))
        return made


@dataclass(frozen=True)
class Scores:
    """What one model scored on one part; the first measurement of an ability is its primary one."""

    reward: Measurement
    abilities: dict[str, list[Measurement]]

    def by(self, kind: str) -> Scores:
        """The abilities that have metrics of both `KINDS`, each by its first one of this kind alone."""
        sides = {n: {kind_of(m.unit): m for m in reversed(ms)} for n, ms in self.abilities.items()}
        return Scores(self.reward, {n: [of[kind]] for n, of in sides.items() if len(of) == len(KINDS)})

    def summary(self) -> dict[str, Any]:
        """Values with 95 % intervals, as plain json."""
        return {
            "reward": interval_of(self.reward),
            "abilities": {name: {m.metric: interval_of(m) for m in ms} for name, ms in self.abilities.items()},
        }


def interval_of(m: Measurement) -> dict[str, float]:
    """Value and 95 % interval over the items."""
    return bounded(interval(m.sampled, m.sampled_as), m.unit)


def bounded(found: Interval, unit: str, *, negated: bool = False) -> dict[str, float]:
    """Value and interval as plain json, without what scores of a unit (`negated`: minus them) cannot be."""
    least, most = BOUNDS.get(unit, (-math.inf, math.inf))
    least, most = (-most, -least) if negated else (least, most)
    return {"value": found.value, "low": max(found.low, least), "high": min(found.high, most)}


def difference(a: Measurement, b: Measurement) -> dict[str, float]:
    """a - b with its 95 % interval and two-sided p, the items paired.

    Raises:
        ValueError: the two were not measured on the same items.
    """
    if a.keys != b.keys:
        raise ValueError(
            f"{a.metric}: expected two measurements of the same items, found {len(a.keys)} and {len(b.keys)}"
        )
    return paired_difference(a.sampled, b.sampled, a.sampled_as)._asdict()


def at_floor(measurements: Sequence[Measurement]) -> bool:
    """Whether PRE's ability is not significantly above chance: nothing is there to be lost.

    It is if some metric that has a chance level does not clear it with its 95 % interval.
    """
    return any(m.chance is not None and interval(m.sampled, m.sampled_as)[1] <= m.chance for m in measurements)


def above_floor(pre: Scores) -> list[str]:
    """The abilities that count: those that PRE has; see `at_floor`."""
    return [name for name, measurements in pre.abilities.items() if not at_floor(measurements)]


def tax_table(pre: Scores, post: Scores, pick: Scores | None = None) -> list[dict[str, Any]]:
    """Rows of reward and of every metric of every ability: PRE, POST, the tax (PRE minus POST), and what a pick leaves.

    A row of a group of tasks holds theirs as "subtasks".
    """
    rows = []
    for name in ("reward", *pre.abilities):
        floor = name != "reward" and at_floor(pre.abilities[name])
        columns = [[s.reward] if name == "reward" else s.abilities[name] for s in (pre, post, pick or pre)]
        for before, after, now in zip(*columns, strict=True):
            measured = (before, after, now if pick else None)
            row = {**_tax_row(name, *measured), "unit_of_loss": unit_of(before, after), "at_floor": floor}
            if before.subtasks:
                each = zip(*(m.apart() for m in (before, after, now)), strict=True)
                row["subtasks"] = [_tax_row(a[0], a[1], b[1], c[1] if pick else None) for a, b, c in each]
            rows.append(row)
    return rows


def _tax_row(name: str, before: Measurement, after: Measurement, now: Measurement | None) -> dict[str, Any]:
    return {
        "name": name,
        "metric": before.metric,
        "unit": before.unit,
        "items": len(before.keys),
        "pre": interval_of(before),
        "post": interval_of(after),
        "pick": now and interval_of(now),
        "tax": difference(before, after),
        "remaining": now and difference(before, now),
        "flips": flips_of(before, after),
        "pick_flips": now and flips_of(before, now),
    }


def fallen(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The abilities above floor of which a metric fell (its tax's interval lies above 0), each with those that did."""
    lost: dict[str, list[str]] = {}
    for r in rows:
        if r["name"] != "reward" and not r["at_floor"] and r["tax"]["low"] > 0:
            lost.setdefault(r["name"], []).append(bare(r["metric"]))
    return [f"{name} ({', '.join(metrics)})" for name, metrics in lost.items()]


def flips_of(before: Measurement, after: Measurement) -> dict[str, Any] | None:
    """`statistics.paired.flips` of what is right or wrong, item by item; None of other scores. A tie is not right.

    Of a group of tasks, less what guessing flips in each; None of one whose score is no mean over its items.
    """
    sides = [m.statistics[:, 0] for m in (before, after)]
    if before.unit != "%" or not (before.metric == "accuracy" or np.isin(sides, (0.0, 100.0)).all()):
        return None
    if before.subtasks and before.aggregate != weighted("mean", [(items, items) for _, items, _ in before.subtasks]):
        return None
    tasks = [(items, chance) for _, items, chance in before.subtasks] or [(len(before.keys), before.chance)]
    rows = cells(*(side == 100 for side in sides))
    counts = np.add.reduceat(rows, np.cumsum([0, *(items for items, _ in tasks)])[:-1])
    together = clustered(rows, before.groups) if before.groups else ()
    return {"chance": before.chance or 0.0, **flips(counts, [(chance or 0.0) / 100 for _, chance in tasks], together)}


def calibrations(pre: Scores, post: Scores, pick: Scores | None = None) -> list[dict[str, Any]]:
    """Calibration error and Brier score of abilities of choices: PRE, POST, the pick, and how far each rose from PRE."""
    rows = []
    for name, measured in pre.abilities.items():
        columns = [measured, post.abilities[name], *([pick.abilities[name]] if pick else [])]
        for ms in zip(*columns, strict=True):
            if any(m.sureness is None for m in ms):  # stored by a version that did not keep it
                continue
            before, *others = (m.sureness for m in ms)
            found = [calibration(before, other, ms[0].groups) for other in others]
            for measure, at in found[0].items():
                more = {"pick": found[1][measure]["post"], "pick_rise": found[1][measure]["rise"]} if pick else {}
                rows.append({"name": name, "measure": measure, "items": len(ms[0].keys), **at, **more})
    return rows


def unit_of(before: Measurement, after: Measurement) -> float:
    """What an ability's loss is measured in: how far POST is from PRE, or two standard errors of that where it is less.

    So PRE is at 0, POST at -1 on an ability that it lost and at about +1 on one that it gained, and where nothing measurable
    moved nothing counts for much: no ability outweighs the others, and the number of items decides nothing.
    """
    value, _, _, error = paired(after.sampled, before.sampled, before.sampled_as).interval()
    return max(abs(value), 2 * error) or 1.0


def units(pre: Scores, post: Scores, counted: Sequence[str]) -> dict[str, float]:
    """`unit_of` each counted ability's primary metric."""
    return {name: unit_of(pre.abilities[name][0], post.abilities[name][0]) for name in counted}


def retentions(pre: Scores, post: Scores, models: Sequence[Scores], counted: Sequence[str]) -> list[dict[str, Any]]:
    """What results files hold of each model: retention by the primary metrics, and by either kind where both were measured.

    Returns:
        retention: None where no ability counts; retention_by: kind -> retention of the counted abilities that have both.
    """

    def rows(kind: str | None = None) -> list[dict[str, Any] | None]:
        first, last, *rest = (s.by(kind) if kind else s for s in (pre, post, *models))
        unit = units(first, last, [name for name in counted if name in first.abilities])
        return [retention(first, s, unit) if unit else None for s in rest]

    sides = {kind: rows(kind) for kind in KINDS}
    return [
        {"retention": kept, "retention_by": {kind: found for kind, of in sides.items() if (found := of[i])}}
        for i, kept in enumerate(rows())
    ]


def reward_kept(pre: Scores, post: Scores, scores: Scores) -> dict[str, float] | None:
    """The share of POST's gain in reward that a model has, with its 95 % interval; None where the gain is not above 0.

    A ratio of two sums over the same prompts: without a gain that is clear of 0 it has no interval.
    """
    if difference(post.reward, pre.reward)["low"] <= 0:
        return None
    columns = [(s.reward.sampled - pre.reward.sampled)[:, :1] for s in (scores, post)]
    return interval(np.hstack(columns), "ratio")._asdict()


def tax_given_back(pre: Scores, post: Scores, scores: Scores, unit: Mapping[str, float]) -> dict[str, float] | None:
    """The share of POST's mean tax that a model is free of, with its 95 % interval; None where that tax is not above 0."""
    if not unit or retention(pre, post, unit)["high"] >= 0:
        return None
    pairs = [{n: (pre.abilities[n][0], s.abilities[n][0]) for n in unit} for s in (scores, post)]
    left, all_of_it = (Studentised.mean([*_steps(p).values()], [*unit.values()]) for p in pairs)
    shares = 1 - divided(left.drawn, all_of_it.drawn)
    value, low, high, _ = resampled_difference(1 - left.value / all_of_it.value, shares)
    return {"value": value, "low": low, "high": high}


def retention(pre: Scores, scores: Scores, unit: Mapping[str, float]) -> dict[str, Any]:
    """`retention_of` the primary metrics of the abilities that `unit` has."""
    return retention_of({name: (pre.abilities[name][0], scores.abilities[name][0]) for name in unit}, unit)


def retention_of(pairs: Mapping[str, tuple[Measurement, Measurement]], unit: Mapping[str, float]) -> dict[str, Any]:
    """Minus the mean share of its own loss that is left of each ability: 0 is PRE, about -1 POST; see `unit_of`.

    Args:
        pairs: an ability as PRE and as this model has it.

    Returns:
        value, low, high (95 %, items resampled, the units held fixed); below: of how many abilities the interval lies below
        PRE; worst: the ability of the least value, with its interval. A gain on one does not hide a loss on another.
    """
    parts = _steps(pairs)
    value, low, high, _ = Studentised.mean(list(parts.values()), [unit[name] for name in parts]).interval()
    alone = {name: [v / unit[name] for v in part.interval()[:3]] for name, part in parts.items()}
    worst = min(alone, key=lambda name: alone[name][0])
    least = dict(zip(("value", "low", "high"), alone[worst], strict=True))
    below = sum(top < 0 for _, _, top in alone.values())
    return {
        "value": value,
        "low": low,
        "high": high,
        "below": below,
        "of": len(alone),
        "worst": {"name": worst, **least},
    }


def _steps(pairs: Mapping[str, tuple[Measurement, Measurement]]) -> dict[str, Studentised]:
    """Each ability's step from PRE; the same items are drawn whatever model is asked for."""
    return {
        name: paired(now.sampled, before.sampled, before.sampled_as, seed=number)
        for number, (name, (before, now)) in enumerate(pairs.items())
    }
