"""Traces as plain dicts: points with their intervals, front lines, step lines, intervals around a tax. No plotly here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from counterpoise.report.palette import look_of
from counterpoise.tables import reading
from counterpoise.tables.numbers import ratio_list, spoken, with_interval
from counterpoise.tables.reading import ENDS, PointEntry, Results

Trace = dict[str, Any]


def legend_mark(method: str) -> Trace:
    """What stands for a method in the legend; a mark of its own, since its points may all be faded."""
    style = look_of(method)
    return {
        "type": "scatter",
        "x": [None],
        "y": [None],
        "mode": "markers",
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 11 if method in ENDS else 10},
        "name": label(method),
        "legendgroup": escaped(method),
    }


def point_marks(results: Results, some: Sequence[PointEntry], axis: str, method: str, *, faded: bool = False) -> Trace:
    """One method's points with their intervals."""
    xs, ys = [reading.axis_score(results, p, axis) or {} for p in some], [p["reward"] for p in some]
    return {
        **legend_mark(method),
        "x": [s.get("value") for s in xs],
        "y": [s["value"] for s in ys],
        "error_x": error_bars(xs, look_of(method).colour),
        "error_y": error_bars(ys, look_of(method).colour),
        "opacity": 0.42 if faded else 1.0,
        "showlegend": False,
        "hovertext": [hover(results, p) for p in some],
        "hoverinfo": "text",
    }


def error_bars(scores: Sequence[Mapping[str, Any]], colour: str, thickness: float = 1) -> dict[str, Any]:
    """95 % intervals as error bars; a score without one gets none."""

    def arms(key: str) -> list[float]:
        return [abs((s.get(key) if s.get(key) is not None else s["value"]) - s["value"]) for s in scores]

    return whiskers(arms("high"), arms("low"), colour, thickness)


def whiskers(up: Sequence[float], down: Sequence[float], colour: str, thickness: float) -> dict[str, Any]:
    """Error bars of these lengths above and below each value."""
    lengths = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
    return {**lengths, "color": colour, "thickness": thickness, "width": 0}


def hover(results: Results, point: PointEntry) -> str:
    """What is shown of a point under the pointer."""
    pick = " (the pick)" if point["name"] == results.get("pick") else ""
    lines = [f"<b>{escaped(point['name'])}</b>{pick}"]
    if point["method"] not in ENDS:
        lines.append(f"ratios {ratio_list(point.get('ratios') or [])}")
    lines.append(f"reward {spoken(point['reward'])}")
    if point.get("retention"):
        lines.append(f"retention {spoken(point['retention'])}")
    at_floor = reading.floored(results)
    for ability, metric in reading.primary(results).items():
        if found := reading.axis_score(results, point, ability):
            floor = " (at floor)" if ability in at_floor else ""
            lines.append(escaped(f"{ability} {metric} {spoken(found)}{floor}"))
    return "<br>".join(lines)


def tax_marks(some: Sequence[tuple[int, Any]], key: str, name: str, colour: str, symbol: str, offset: float) -> Trace:
    """Taxes in standard errors at PRE with their intervals, one row an ability."""
    scaled = [{k: v / reading.standard_error(r["pre"]) for k, v in r[key].items() if v is not None} for _, r in some]
    told = [
        f"{r['name']} {r['metric']}, {name}: tax {' '.join(with_interval(r[key], signed=True))} {r.get('unit') or ''}"
        for _, r in some
    ]
    return {
        "type": "scatter",
        "x": [s["value"] for s in scaled],
        "y": [i + offset for i, _ in some],
        "error_x": error_bars(scaled, colour, thickness=2),
        "mode": "markers",
        "marker": {"color": colour, "symbol": symbol, "size": 10},
        "name": label(name),
        "hovertext": [escaped(text) for text in told],
        "hoverinfo": "text",
    }


def step_line(
    found: Iterable[reading.Share], name: str, colour: str, width: float, opacity: float, *, dash: str = "solid"
) -> Trace:
    """Ratios as steps over the layers; as bare marks where blocks share layers."""
    shares = list(found)
    of = reading.by_layer(shares)
    block_of = {n: s.block for s in shares for n in s.layers}
    xs: list[Any] = list(of) if of else [escaped(s.block) for s in shares]
    labels = [f"{block_of[n]}, layer {n}" if block_of[n] != f"layer {n}" else block_of[n] for n in of or ()] or xs
    return {
        "type": "scatter",
        "x": xs,
        "y": list(of.values()) if of else [s.ratio for s in shares],
        "mode": "markers" if not of else "lines" if len(of) > 1 else "lines+markers",
        "line": {"color": colour, "width": width, "shape": "hvh", "dash": dash},
        "marker": {"color": colour, "size": 5 + 2 * width},
        "opacity": opacity,
        "name": label(name),
        "hovertext": [escaped(label) for label in labels],
        "hovertemplate": "%{hovertext}: %{y:.3f}",
    }


def label(text: str, longest: int = 32) -> str:
    """Escaped, and cut where it would take the room of the figure.

    >>> label("a < b"), label("abcdefghijklmnop", 8)
    ('a &lt; b', 'abcdefg…')
    """
    return escaped(text if len(text) <= longest else f"{text[: longest - 1]}…")


def escaped(text: str) -> str:
    """Escaped: plotly reads some html in what it writes."""
    return html.escape(str(text), quote=False)
