"""The figures: results dicts in, plotly figures out. Plotly is imported here alone, when a figure is made."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from counterpoise.report.palette import Look, light, look_of
from counterpoise.tables import reading
from counterpoise.tables.numbers import number, ratio_list, spoken, with_interval
from counterpoise.tables.reading import ENDS, VALIDATION, PointEntry, Results

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Trace = dict[str, Any]
RETENTION_TITLE = "Retention: minus the tax left<br>0: PRE; −1: all that each ability lost"


def plot_front(results: Results, axis: str, part: str = VALIDATION, look: Callable[[str], Look] = look_of) -> Figure:
    """Reward against retention, or against one ability: every point, the front, PRE, POST and the pick.

    Args:
        axis: "retention", or an ability, shown by its primary metric; see `reading.axes`.
        part: "validation", where the pick was made, or "held-out".
        look: of each method.

    Raises:
        ValueError: no such axis.
    """
    known = reading.axes(results)
    if axis not in known:
        raise ValueError(f"front: expected an axis among {', '.join(known) or 'none'}, found {axis!r}")
    found = reading.plottable(results, part, axis)
    best = reading.undominated(results, found, axis)
    figure = empty_figure(_axis_title(results, axis), "Reward")
    figure.add_scatter(
        x=[reading.score_value(results, p, axis) for p in best],
        y=[p["reward"]["value"] for p in best],
        mode="lines",
        line={"color": light("muted"), "width": 1.5},
        name="front",
        legendgroup="front",
        hoverinfo="skip",
    )
    for method in dict.fromkeys(p["method"] for p in found):
        if method not in ENDS:  # these are named beside their points
            figure.add_trace(legend_mark(method, look(method)))
        for faded in (False, True):
            some = [p for p in found if p["method"] == method and (p not in best and method not in ENDS) == faded]
            if some:
                figure.add_trace(point_marks(results, some, axis, look(method), faded=faded))
    _mark(figure, results, found, axis)
    if (reward := reading.needed_reward(results, part)) is not None:  # the least that the pick may have
        figure.add_hline(y=reward, **dotted(f"{results['settings']['keep_reward']:.0%} of the reward gain"))
    return figure


def plot_taxes(results: Results) -> Figure:
    """The tax of POST and what the pick leaves of it, ability by ability, as shares of its own loss, with intervals.

    Primary metrics, held-out data. Abilities at floor are left out, as they are from the mean.
    """
    rows = reading.counted_taxes(results)
    figure = empty_figure("Tax left (1: all that POST lost)", "")
    pick = reading.picked(results)
    kinds = [("tax", "POST", look_of("POST"))]
    if pick is not None:
        kinds.append(("remaining", str(pick["name"]), look_of(pick["method"])))
    for (key, name, look), offset in zip(kinds, (0.13, -0.13) if len(kinds) > 1 else (0.0,), strict=True):
        if some := [(i, r) for i, r in enumerate(rows) if reading.known(r.get(key))]:
            figure.add_trace(tax_marks(some, key, name, look, offset))
    figure.add_vline(x=0, line={"color": light("muted"), "width": 1})
    name_rows(figure, [r["name"] for r in rows], list(range(len(rows))))
    return figure


def plot_ratios(results: Results) -> Figure:
    """The ratio of each layer: the pick, MA at the same mean, and HMA at every mean. By block where blocks share layers."""
    figure = empty_figure("Layer, from input to output", "Share of the update kept")
    pick = reading.picked(results)
    drawn = [p for p in reading.measured_points(results) if p["method"] == "HMA" and p is not pick]
    for i, point in enumerate(drawn, start=1):
        shares, strength = reading.point_shares(results, point), 0.3 + 0.45 * i / len(drawn)
        figure.add_trace(step_line(shares, str(point["name"]), look_of("HMA").colour, 1.5, strength))
    if pick is not None and pick["ratios"]:
        shares = reading.point_shares(results, pick)
        if pick["method"] != "MA":
            flat = [reading.Share(s.block, pick["mean"], s.layers) for s in shares]
            name = f"MA {number(pick['mean'], 2)}"
            figure.add_trace(step_line(flat, name, look_of("MA").colour, 1.5, 1.0, dash="dash"))
        figure.add_trace(step_line(shares, f"{pick['name']} (the pick)", look_of(pick["method"]).colour, 3.5, 1.0))
    top = max([1.0, *(r for p in [*drawn, *([pick] if pick else [])] for r in p["ratios"])])
    figure.update_yaxes(range=[-0.04, top * 1.04], zeroline=False)
    return figure


def plot_two_sided(results: Results, how: str) -> Figure:
    """The ratio of each layer for every lambda of a two-sided search, the exact one or the path."""
    found = results.get("two_sided") or {}
    rows = sorted((r for r in found.get("rows") or () if r["how"] == how), key=lambda r: float(r["lambda"]))
    figure = empty_figure("Layer, from input to output", "Share of the update kept")
    for i, row in enumerate(rows, start=1):
        strength = 0.35 + 0.65 * i / len(rows)
        shares = reading.block_shares(found.get("partition") or {}, row["ratios"])
        name, colour = f"lambda {number(row['lambda'], 2)}", look_of(f"two-sided {how}").colour
        figure.add_trace(step_line(shares, name, colour, 1.2 + 1.2 * strength, strength))
    figure.update_yaxes(range=[-0.04, 1.04], zeroline=False)
    return figure


def empty_figure(x_title: str, y_title: str) -> Figure:
    """A figure in the look of all of them, with its axes named and nothing in it."""
    import plotly.graph_objects as go

    ink, muted, rule, surface = (light(role) for role in ("ink", "muted", "rule", "surface"))
    axis = {"showline": True, "zeroline": False, "ticks": "outside", "ticklen": 4, "automargin": True}
    axis |= {"gridcolor": light("faint"), "linecolor": rule, "tickcolor": rule}
    layout = go.Layout(
        template="none",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": ink},
        paper_bgcolor=surface,
        plot_bgcolor=surface,
        margin={"l": 12, "r": 16, "t": 12, "b": 12},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": muted}},
        hoverlabel={"align": "left", "bgcolor": surface, "bordercolor": rule, "font": {"color": ink, "size": 12}},
        hovermode="closest",
        dragmode=False,
        xaxis={**axis, "title": {"standoff": 10, "font": {"size": 13}, "text": x_title}},
        yaxis={**axis, "title": {"standoff": 10, "font": {"size": 13}, "text": y_title}},
    )
    return go.Figure(layout=layout)


def name_rows(figure: Figure, names: Sequence[str], places: Sequence[int]) -> None:
    """Names at their places on the vertical axis, instead of numbers."""
    ticks = [label(name, 18) for name in names]
    figure.update_yaxes(tickvals=places, ticktext=ticks, showgrid=False, range=[-0.6, len(names) - 0.4])


def dotted(text: str) -> dict[str, Any]:
    """A thin dotted line, as `add_hline` and `add_vline` take it; its words are in the legend, where no point can lie."""
    return {"line": {"color": light("muted"), "width": 1, "dash": "dot"}, "name": text, "showlegend": True}


def _axis_title(results: Results, axis: str) -> str:
    if axis in reading.MEANS:
        name = reading.axis_label(results, axis).capitalize()
        return name if reading.is_old(results) else RETENTION_TITLE.replace("Retention", name)
    metric, unit = reading.primary(results).get(axis, ""), reading.unit(results, axis)
    return label(f"{axis}: {metric}{f' ({unit})' if unit and unit.lower() != metric.lower() else ''}", 48)


def _mark(figure: Figure, results: Results, found: Sequence[PointEntry], axis: str) -> None:
    """Name PRE, POST and the pick beside their points, and ring the pick."""
    for point in found:
        pick = point["name"] == results.get("pick")
        if not pick and point["method"] not in ENDS:
            continue
        x, y = reading.score_value(results, point, axis), point["reward"]["value"]
        if pick:
            ring = {"symbol": "circle-open", "size": 22, "color": light("ink"), "line": {"width": 2}}
            figure.add_scatter(x=[x], y=[y], mode="markers", marker=ring, showlegend=False, hoverinfo="skip")
        right = point["method"] != "PRE"
        figure.add_annotation(
            x=x,
            y=y,
            text=f"<b>{label(point['name'], 12)}</b>" + (" (the pick)" if pick else ""),
            showarrow=False,
            xanchor="left" if right else "right",
            yanchor="bottom" if right else "top",  # where the front does not run
            xshift=13 if right else -10,
            yshift=10 if pick else 5 if right else -5,
            font={"color": light("ink")},
        )


def legend_mark(method: str, style: Look) -> Trace:
    """What stands for a method in the legend; a mark of its own, since its points may all be faded."""
    return {
        "type": "scatter",
        "x": [None],
        "y": [None],
        "mode": "markers",
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 11 if method in ENDS else 10},
        "name": label(method),
        "legendgroup": escaped(method),
    }


def point_marks(results: Results, some: Sequence[PointEntry], axis: str, style: Look, *, faded: bool = False) -> Trace:
    """One method's points with their intervals."""
    xs, ys = [reading.axis_score(results, p, axis) or {} for p in some], [p["reward"] for p in some]
    return {
        **legend_mark(some[0]["method"], style),
        "x": [s.get("value") for s in xs],
        "y": [s["value"] for s in ys],
        "error_x": error_bars(xs, style.colour),
        "error_y": error_bars(ys, style.colour),
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
    lines += [f"{a} {spoken(found)}" for a in reading.MEANS if (found := reading.retained(point, a))]
    at_floor = reading.floored(results)
    for ability, metric in reading.primary(results).items():
        if found := reading.axis_score(results, point, ability):
            floor = " (at floor)" if ability in at_floor else ""
            lines.append(escaped(f"{ability} {metric} {spoken(found)}{floor}"))
    return "<br>".join(lines)


def tax_marks(some: Sequence[tuple[int, Any]], key: str, name: str, look: Look, offset: float) -> Trace:
    """Taxes as shares of each ability's own with their intervals, one row an ability."""
    scaled = [{k: v / reading.tax_unit(r) for k, v in r[key].items() if v is not None} for _, r in some]
    told = [
        f"{r['name']} {r['metric']}, {name}: tax {' '.join(with_interval(r[key], signed=True))} {r.get('unit') or ''}"
        for _, r in some
    ]
    return {
        "type": "scatter",
        "x": [s["value"] for s in scaled],
        "y": [i + offset for i, _ in some],
        "error_x": error_bars(scaled, look.colour, thickness=2),
        "mode": "markers",
        "marker": {"color": look.colour, "symbol": look.symbol, "size": 10},
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
