"""front.html: any set of result files on one page: every method's points, who beats whom, and what is kept at equal reward."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from counterpoise.report import plots
from counterpoise.report.comparisons import Comparison, beaten_by, pooled
from counterpoise.report.matched import PointGains, hypervolume_gains, matched, method_gains
from counterpoise.report.page import Figures, fact_list, headed, header, page, plot_box, section
from counterpoise.report.palette import SERIES, Look, light, look_of
from counterpoise.statistics.equal_reward import Matched
from counterpoise.tables import reading
from counterpoise.tables.grid import Cell, Column, Table
from counterpoise.tables.numbers import number, p_value, with_interval
from counterpoise.tables.reading import ENDS, REFERENCE, RETENTION, Results
from counterpoise.tables.tables import RETENTION_TOLD
from counterpoise.tables.taxes import difference_cell, over_runs_cell

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_KNOWN = ("MA", "HMA", "LiNeS", "reversed", "random")
# Beyond the palette's six; of middle lightness, since the page swaps only the palette's own where dark is preferred.
_MORE_COLOURS = ("#7a63d2", "#c0485a", "#0f93a8", "#6f8f2a", "#a06a44", "#c04fae")
_MORE_SYMBOLS = (
    "pentagon", "star", "hourglass", "bowtie", "diamond-wide", "hexagram", "star-square", "circle-cross", "square-x",
)  # fmt: skip
_GROUP_SYMBOLS = ("circle", "triangle-up", "square", "star", "diamond-tall", "pentagon")
_CAPTION = (
    f"Up is more reward, right is more ability kept; one colour a method. {RETENTION_TOLD} Bars are 95 % intervals of each "
    "point alone, over items. Faded points are beaten by another in both. The line is the front."
)

_VOLUME = (
    "The area under each method's front between PRE's reward and POST's retention; the rectangle that PRE and POST span "
    f"counts as 1. PRE and POST belong to every front. More points make a larger area, so that a method is compared with "
    f"{REFERENCE} at as many points as it has, the mean over all choices of them; not with fewer."
)
_STUDENT = (
    "Student's 95 % interval with the training runs as the sample, and its p: what another seed would give; the interval over "
    "items speaks of these seeds alone. Believe what both leave 0 out of."
)


def fronts_page(comparisons: Sequence[Comparison]) -> str:
    """The page as text: a figure and three tables a comparison."""
    figures: Figures = {}
    runs = sum(len(p.runs) for p in comparisons)
    title = f"{runs} {'run' if runs == 1 else 'runs'} on {'one front' if len(comparisons) == 1 else f'{len(comparisons)} fronts'}"
    apart = "Files with another reward or other abilities cannot share an axis; each set has its own part."
    head = f"<p class=lead>{apart}</p>" if len(comparisons) > 1 else ""
    parts = [_comparison_section(c, f"front-{n}", figures) for n, c in enumerate(comparisons, start=1)]
    body = "".join([header("reward against abilities, every method", title, head), *parts])
    return page(f"counterpoise: {title}", body, figures)


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """A colour and mark for each method: its own where it has one, else a colour that none of the others has.

    Past twelve or so methods colours come back, with other marks.
    """
    own = {m: look_of(m) for m in methods if m in (*_KNOWN, *ENDS)}
    taken = {style.colour for style in own.values()}
    colours = [c for c in (*(light(role) for role in SERIES), *_MORE_COLOURS) if c not in taken]
    others = [m for m in methods if m not in own]
    return own | {
        m: Look(colours[i % len(colours)], _MORE_SYMBOLS[(i + i // len(colours)) % len(_MORE_SYMBOLS)])
        for i, m in enumerate(others)
    }


def front_figure(results: Results, axis: str, part: str) -> Figure:
    """`plots.plot_front` with a colour for every method; where there are several groups, a mark for each."""
    of = looks(list(dict.fromkeys(p["kind"] for p in results["points"])))
    groups = list(dict.fromkeys(p["group"] for p in results["points"]))
    about = {p["method"]: (of[p["kind"]], groups.index(p["group"])) for p in results["points"]}

    def look(method: str) -> Look:
        own, group = about[method]
        alone = len(groups) == 1 or method in ENDS
        return own if alone else Look(own.colour, _GROUP_SYMBOLS[group % len(_GROUP_SYMBOLS)])

    return plots.plot_front(results, axis, part, look)


def points_table(comparison: Comparison, results: Results) -> Table:
    """Every point, pooled over runs, and what beats it."""
    axis = (reading.axes(results) or [RETENTION])[0]
    title = reading.axis_label(results, axis)
    rows = [p for part in reading.parts(results) for p in reading.measured_points(results, part)]
    over = {id(p): beaten_by(results, p, axis) for p in rows}
    several = any(p["runs"] > 1 for p in rows)
    scores = [Column(reading.axis_label(results, a), _score_on(results, a)) for a in reading.axes(results)]
    columns = [
        Column("point", lambda p: Cell(str(p["name"]), f"{p['runs']} runs" if p["runs"] > 1 else ""), False),
        Column("data", lambda p: Cell(str(p.get("part") or "")), False),
        Column("reward", lambda p: Cell(*with_interval(p.get("reward") or {}))),
        *([Column("reward over runs", lambda p: over_runs_cell(_of_runs(p), signed=False))] if several else []),
        *scores[:1],
        Column("beaten by", lambda p: Cell(_few(over[id(p)])), False),
        *scores[1:],
    ]
    notes = [f"Beaten by: points that are at least as good in reward and {title} and better in one, by value alone."]
    if several:
        items = "Brackets: 95 % intervals over items for these runs;"
        notes.append(f"Pooled over runs that differ in the seed. {items} over runs: {_STUDENT}")
    return Table(tuple(columns), tuple(rows), tuple(notes), lambda p: bool(over[id(p)]))


def hypervolume_table(comparison: Comparison) -> Table:
    """Hypervolume of each method's front in every run, the largest mean first."""
    found: dict[tuple[str, str], list[float]] = {}
    for group in comparison.groups:
        for run in group.runs:
            for method, value in hypervolumes(run.results).items():
                found.setdefault((group.name, method), []).append(value)
    part = _fullest(comparison.runs[0].results)
    gains = hypervolume_gains(comparison, part)
    compared = {**gains, **{key: None for key in found if key[1] == REFERENCE}}

    def place(item: tuple[tuple[str, str], list[float]]) -> tuple[bool, float]:
        """The compared ones first, by what they are above or below the reference; areas alone do not compare."""
        known = bool(gains) and item[0] in compared
        gain = gains.get(item[0])
        return not known, -(gain.value if gain else 0.0) if known else -sum(item[1]) / len(item[1])

    rows = sorted(found.items(), key=place)
    groups = {g.name: g for g in comparison.groups}
    others = [key for key, _ in rows if key[1] != REFERENCE]
    means = [axis for axis in reading.axes(comparison.runs[0].results) if axis in reading.MEANS]
    sides = {axis: {key: method_gains(groups[key[0]], key[1], part, axis) for key in others} for axis in means}
    kept = sides.pop(RETENTION, {})
    columns = [
        Column("method", lambda r: Cell(r[0][1], r[0][0] if len(comparison.groups) > 1 else ""), False),
        Column("hypervolume", lambda r: Cell(number(sum(r[1]) / len(r[1]), 3))),
    ]
    several = len(comparison.runs) > len(comparison.groups)
    columns += [Column("runs", lambda r: Cell(number(len(r[1]), 0)))] if several else []
    if gains:
        columns += [
            Column(f"minus {REFERENCE}'s of as many points", lambda r: _gain(gains.get(r[0]))),
            Column("p", lambda r: Cell(p_value(gains[r[0]].p) if r[0] in gains else "")),
            *_over_runs(several, lambda r: gains.get(r[0])),
        ]
    if any(kept.values()):
        columns += [
            Column("retention at equal reward", _gain_of(kept)),
            Column("p", lambda r: Cell(p_value(g.p) if (g := kept.get(r[0])) else "")),
            *_over_runs(several, lambda r: kept.get(r[0])),
            Column("points above", lambda r: Cell(_points_above(kept.get(r[0]))), False),
            *(Column(f"{axis}, too", _gain_of(found)) for axis, found in sides.items()),
        ]
    paired = any(math.isfinite(g.low) for g in gains.values())
    brackets = " Brackets: 95 % intervals by paired bootstrap over items, pooled over runs." if paired else ""
    notes = [f"{_VOLUME}{brackets}"]
    notes += [f"Over runs: {_STUDENT}"] if several else []
    if any(kept.values()):
        at = f"minus {REFERENCE}'s at each point's own reward, the mean over a method's points."
        notes.append(f"Retention at equal reward: {at}")
    return Table(tuple(columns), tuple(rows), tuple(notes))


def hypervolumes(results: Results) -> dict[str, float]:
    """Scaled hypervolume of each method with PRE and POST, from the part with most points; else what the file recorded."""
    part = _fullest(results)
    recorded = {m: v for m, v in (results.get("hypervolume") or {}).items() if v is not None}
    if recorded and not any(p.get("ratios") for p in reading.plottable(results, part, RETENTION)):
        return recorded
    found = reading.method_volumes(results, part)
    return recorded if found is None else {m: v.value for m, v in found.items()}


def matched_table(comparison: Comparison, rows: Sequence[PointGains]) -> Table:
    """What each point keeps beyond MA at its own reward."""
    results = comparison.runs[0].results
    axes = reading.axes(results)
    unreached = [r.name for r in rows if not r.gains]
    shown = [r for r in rows if r.gains]
    several = any(len(g.by_run) > 1 for r in shown for g in r.gains.values())
    paired = any(math.isfinite(g.p) for r in shown for g in r.gains.values())
    first = next((a for a in axes if any(a in r.gains for r in shown)), RETENTION)
    columns = [
        Column("point", lambda r: Cell(r.name, _about(r, comparison)), False),
        Column("data", lambda r: Cell(r.part), False),
        *(Column(reading.axis_label(results, a), _gain_on(a)) for a in axes),
        *([Column("p", lambda r: Cell(p_value(r.gains[first].p if first in r.gains else None)))] if paired else []),
        *_over_runs(several, lambda r: r.gains.get(first)),
    ]
    notes = [
        f"Score minus that of {REFERENCE} (with PRE and POST as its ends) at the same reward, read off straight lines between "
        "its points; positive is better than averaging.",
        f"Brackets: 95 % intervals by paired bootstrap over prompts and items, pooled over runs; bold: they leave out 0. p is "
        f"of {reading.axis_label(results, first)}, two-sided, not adjusted for the number of rows."
        if paired
        else "No intervals: these files do not hold the score of every item (evaluation.results writes files that do).",
    ]
    if several:
        notes.append(f"Over runs, of {reading.axis_label(results, first)}: {_STUDENT}")
    if not any(p["method"] == REFERENCE for run in comparison.runs for p in run.results["points"]):
        notes = [f"These files hold no points of {REFERENCE}, so nothing is compared at equal reward."]
    elif unreached:
        notes.append(
            f"{REFERENCE} does not reach the reward of: {', '.join(dict.fromkeys(unreached))}; or was not measured."
        )
    return Table(tuple(columns), tuple(shown), tuple(notes))


def _comparison_section(comparison: Comparison, name: str, figures: Figures) -> str:
    results = pooled(comparison)
    parts = [p for p in reading.parts(results) if any(reading.plottable(results, p, a) for a in reading.axes(results))]
    axes = [a for a in reading.axes(results) if all(reading.plottable(results, p, a) for p in parts)]
    menus = {
        "horizontal axis:": {a: reading.axis_label(results, a) for a in axes},
        "measured on:": {p: f"{p} data" for p in parts},
    }
    facts: Mapping[str, Any] = {
        "Reward": comparison.reward,
        "Files": ", ".join(file for run in comparison.runs for file in run.files),
        "Runs": len(comparison.runs) if len(comparison.runs) > 1 else None,
    }
    notes = "".join(f"<p class=note>{html.escape(n)}</p>" for n in comparison.notes)
    title = "Reward against abilities kept"
    box = plot_box(figures, name, title, partial(front_figure, results), _CAPTION, menus)
    content = f"{fact_list(facts)}<h3>{title}</h3>{box}{notes}"
    kept = matched_table(comparison, matched(comparison))
    content += headed(f"At the same reward as {REFERENCE}", kept)
    if kept.notes and not kept:
        content += f"<p class=note>{html.escape(kept.notes[-1])}</p>"
    content += headed("Hypervolume", hypervolume_table(comparison))
    content += headed("Every point", points_table(comparison, results))
    return section(_heading(comparison), content)


def _heading(comparison: Comparison) -> str:
    abilities = list(reading.primary(comparison.runs[0].results))
    return f"{comparison.reward or 'Reward'} against {', '.join(abilities) or 'retention'}"


def _fullest(results: Results) -> str:
    """The part with most points."""
    return max(
        reading.parts(results), key=lambda p: len(reading.measured_points(results, p)), default=reading.VALIDATION
    )


def _gain(found: Matched | None) -> Cell:
    if found is None:
        return Cell(number(None, 2))
    if not math.isfinite(found.low):
        return Cell(number(found.value, 3, signed=True))
    return difference_cell(found._asdict())


def _score_on(results: Results, axis: str) -> Callable[[Any], Cell]:
    return lambda point: Cell(*with_interval(reading.axis_score(results, point, axis) or {}))


def _gain_of(found: Mapping[tuple[str, str], Matched | None]) -> Callable[[Any], Cell]:
    return lambda row: _gain(found[row[0]]) if row[0] in found else Cell("")


def _gain_on(axis: str) -> Callable[[Any], Cell]:
    return lambda row: _gain(row.gains.get(axis))


def _about(row: PointGains, comparison: Comparison) -> str:
    runs = max(len(g.by_run) for g in row.gains.values())
    lost = max(sum(v is None for v in g.by_run) for g in row.gains.values())
    told = [row.group] if len(comparison.groups) > 1 else []
    told += [f"{runs} runs"] if runs > 1 else []
    told += [f"{lost} out of {REFERENCE}'s reach"] if lost else []
    return ", ".join(told)


def _over_runs(several: bool, of: Callable[[Any], Matched | None]) -> list[Column]:
    return [Column("over runs", lambda r: over_runs_cell(g.seeds if (g := of(r)) else ()))] if several else []


def _of_runs(point: Mapping[str, Any]) -> Sequence[float]:
    return (point.get("reward") or {}).get("runs") or ()


def _points_above(found: Matched | None) -> str:
    if found is None:
        return ""
    seen = [v for v in found.by_run if v is not None]
    beyond = len(found.by_run) - len(seen)
    return f"{sum(v > 0 for v in seen)} of {len(seen)}" + (f", {beyond} out of reach" if beyond else "")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
