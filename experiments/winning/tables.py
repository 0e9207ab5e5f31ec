"""The page of the evidence: healing beside every averaging, over worlds.

    python experiments/winning/tables.py [--results FOLDER]

Reads world-*.json, which hold every item, and writes worlds.md beside them; nothing is measured. Intervals are t intervals over
worlds (95 %); those over items are in the files.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from counterpoise.evaluation.results import loss_units
from counterpoise.report.matched import reference_curve
from counterpoise.statistics.equal_reward import meeting
from counterpoise.tables import reading

HERE = Path(__file__).resolve().parent
PART = "held-out"
SECONDS = {"capitals": "accuracy", "sums": "accuracy", "translation": "exact"}
"""Abilities with a second metric."""


def main() -> None:
    """Read, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    folder = parser.parse_args().results
    worlds = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("world-*.json"))]
    (folder / "worlds.md").write_text(page(worlds), encoding="utf-8")


def page(worlds: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    names = dict.fromkeys(p["name"] for w in worlds for p in reading.measured_points(w, PART))
    rows = [row(name, worlds) for name in names if name != "PRE"]
    titles = ["", "worlds", "reward kept", "tax left", "worst ability left", "exact, accuracy left",
              "retention beyond MA at its reward", "tokens trained", "seconds"]  # fmt: skip
    lines = [
        "# Healing beside averaging, over demo worlds of twelve layers",
        "",
        "Held-out data. Reward kept: share of POST's gain. Tax left: the share of each ability's own loss (likelihood) that is",
        "left, mean of the abilities; the worst of them beside it. Exact, accuracy left: the same by accuracy and exact match,",
        "pooled over the abilities that have one. Beyond MA: retention minus that of plain averaging at the same reward, where",
        "MA's curve reaches it (in how many worlds). Brackets: 95 % t intervals over worlds.",
        "",
        f"| {' | '.join(titles)} |",
        f"|---|{'---:|' * (len(titles) - 1)}",
        *(f"| {' | '.join(cells)} |" for cells in rows),
        "",
        *pairs(worlds),
        "",
        f"Commits {', '.join(dict.fromkeys(w['commit'] for w in worlds))}; command `{worlds[0]['command']}`; versions "
        f"{reading.version_list(worlds[0])}. Times are of a shared machine.",
    ]
    return "\n".join(lines) + "\n"


def row(name: str, worlds: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells of one arm."""
    found = [w for w in worlds if point(w, name) is not None]
    gains = [g for w in found if (g := beyond(w, name)) is not None]
    costs = [point(w, name)["settings"] for w in found]  # type: ignore[index]
    return [
        name,
        str(len(found)),
        spread([kept(w, name) for w in found]),
        spread([float(np.mean([*left(w, name).values()])) for w in found]),
        spread([max(left(w, name).values()) for w in found]),
        spread([left_by_answers(w, name) for w in found]),
        f"{spread(gains)} ({len(gains)})" if gains else "",
        spread([c["trained"] for c in costs if "trained" in c], 0),
        spread([c["seconds"] for c in costs if "seconds" in c], 0),
    ]


def pairs(worlds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Differences between two arms, paired by world: reward kept, tax left, worst ability left."""
    asked = (
        ("POST healed 15 bandit", "POST healed 15"), ("POST healed 30 bandit", "POST healed 30"),
        ("POST healed 15 forward", "POST healed 15"), ("POST healed 15 jensen-shannon", "POST healed 15"),
        ("POST healed 15", "POST trained on, replay"), ("POST healed 15", "POST trained on, KD 0.1 and replay"),
        ("POST healed 15", "MA 0.8"), ("POST healed 15", "LiNeS 0.9"), ("LiNeS 0.8 healed 15", "LiNeS 0.6"),
    )  # fmt: skip
    lines = [
        "| first minus second | worlds | reward kept | tax left | worst ability left |",
        "|---|---:|---:|---:|---:|",
    ]
    measures: tuple[Callable[[Any, str], float], ...] = (
        kept,
        lambda w, n: float(np.mean([*left(w, n).values()])),
        lambda w, n: max(left(w, n).values()),
    )
    for first, second in asked:
        both = [w for w in worlds if point(w, first) and point(w, second)]
        cells = [spread([m(w, first) - m(w, second) for w in both]) for m in measures]
        lines.append(f"| {first} minus {second} | {len(both)} | {' | '.join(cells)} |")
    return lines


def point(world: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The held-out point of a name."""
    return next((p for p in reading.measured_points(world, PART) if p["name"] == name), None)


def three(world: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """PRE, POST and the point."""
    return [p for n in ("PRE", "POST", name) if (p := point(world, n)) is not None]


def kept(world: Mapping[str, Any], name: str) -> float:
    """The share of POST's gain in reward."""
    pre, post, own = (p["reward"]["value"] for p in three(world, name))
    return float((own - pre) / (post - pre))


def left(world: Mapping[str, Any], name: str) -> dict[str, float]:
    """Of each ability above floor the share of its own loss that is left, in its unit, by likelihood."""
    primary = {a: m for a, m in reading.primary(world).items() if a not in reading.floored(world)}
    units = loss_units(world, PART, primary) or {}
    values = [{a: p["abilities"][a][m]["value"] for a, m in primary.items()} for p in three(world, name)]
    return {a: (values[0][a] - values[2][a]) / units[a] for a in primary}


def left_by_answers(world: Mapping[str, Any], name: str) -> float:
    """Percentage points lost by accuracy and exact match, as a share of those that POST lost, summed over abilities."""
    pre, post, own = ([p["abilities"][a][m]["value"] for a, m in SECONDS.items()] for p in three(world, name))
    lost = sum(pre) - sum(post)
    return (sum(pre) - sum(own)) / lost if lost else math.nan


def beyond(world: Mapping[str, Any], name: str) -> float | None:
    """Retention minus plain averaging's at the same reward; None where that does not reach it."""
    own, curve = point(world, name), reference_curve(world, PART, reading.RETENTION)
    if own is None or own["method"] in ("MA", "PRE", "POST"):
        return None
    x = [p["reward"]["value"] - own["reward"]["value"] for p in curve]
    y = [p["retention"]["value"] - own["retention"]["value"] for p in curve]
    value, inside = meeting([x], [y])
    return float(-value[0]) if inside[0] else None


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and 95 % t interval over worlds."""
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return ""
    mean = float(np.mean(known))
    if len(known) < 2:
        return f"{mean:,.{digits}f}"
    half = float(stats.t.ppf(0.975, len(known) - 1) * np.std(known, ddof=1) / math.sqrt(len(known)))
    return f"{mean:,.{digits}f} [{mean - half:,.{digits}f}, {mean + half:,.{digits}f}]"


if __name__ == "__main__":
    main()
