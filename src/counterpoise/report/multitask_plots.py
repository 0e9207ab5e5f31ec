"""The figures of a multi-task run, in the look of `counterpoise.report.plots`. Few tasks get a colour each; of many, some
are picked out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from counterpoise.report import history
from counterpoise.report.history import Curve, Record
from counterpoise.report.palette import SERIES, light
from counterpoise.report.plots import dotted, empty_figure, escaped, label, name_rows, whiskers

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FEW = 6
"""Tasks up to this many are told apart by colour and dash."""
MOST_ROWS = 20
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def plot_accuracies(record: Record) -> Figure:
    """Accuracy by task, the least at the top: test data with 95 % intervals, and validation at the best epoch.

    Of more than `MOST_ROWS` tasks, those with the least.
    """
    figure = empty_figure(f"{history.judged_by(record).capitalize()} (%)", "")
    scores = history.final_scores(record)[:MOST_ROWS]
    places, names = list(range(len(scores) - 1, -1, -1)), [s.task for s in scores]
    rows: dict[str, Any] = {"y": places, "mode": "markers", "hovertext": [escaped(t) for t in names]}
    if history.best(record) is not None:
        figure.add_scatter(
            x=[100 * (s.validation or 0.0) for s in scores],
            name="validation, at the best epoch",
            marker={"color": light("muted"), "symbol": "circle-open", "size": 9, "line": {"width": 2}},
            hovertemplate="%{hovertext}: %{x:.1f} % on validation<extra></extra>",
            **rows,
        )
    if scores and scores[0].test:
        share = [
            history.wilson_interval(s.accuracy, s.test["examples"]) if "accuracy" in s.test else None for s in scores
        ]
        ends = [found or (s.accuracy, s.accuracy) for found, s in zip(share, scores, strict=True)]
        at = [100 * s.accuracy for s in scores]
        up = [100 * high - x for (_, high), x in zip(ends, at, strict=True)]
        down = [x - 100 * low for (low, _), x in zip(ends, at, strict=True)]
        figure.add_scatter(
            x=at,
            error_x=whiskers(up, down, light("blue"), 2),
            name="test",
            marker={"color": light("blue"), "symbol": "diamond", "size": 10},
            hovertemplate="%{hovertext}: %{x:.1f} % on test data<extra></extra>",
            **rows,
        )
    name_rows(figure, names, places)
    return figure


def plot_curves(record: Record, found: Mapping[str, Curve], title: str) -> Figure:
    """A curve per task over the epochs, and the best epoch; of more than `FEW` the highest and lowest at the end stand out."""
    figure = empty_figure("Epoch", title)
    ends = sorted(found, key=lambda t: found[t].values[-1] if found[t].values else 0.0)
    picked = {ends[-1]: "vermilion", ends[0]: "blue"} if ends else {}
    few = len(found) <= FEW
    for i, (task, curve) in enumerate(found.items()):
        role = SERIES[i] if few else picked.get(task, "grey")
        strong = few or task in picked
        figure.add_scatter(
            x=curve.epochs,
            y=curve.values,
            name=label(task),
            mode="lines+markers" if len(curve.values) == 1 else "lines",
            line={"color": light(role), "width": 2.5 if strong else 1, "dash": DASHES[i] if few else "solid"},
            opacity=1.0 if strong else 0.55,
            showlegend=strong,
            zorder=1 if strong else 0,
            hovertemplate=f"{label(task)}<br>epoch %{{x:.4~g}}: %{{y:.4~g}}<extra></extra>",
        )
    _mark_best(figure, record)
    return figure


def plot_weights(record: Record, found: Mapping[str, Curve]) -> Figure:
    """Each task's share of the weights over the rounds (`history.weight_shares`)."""
    shares = {t: Curve(c.epochs, [100 * v for v in c.values]) for t, c in found.items()}
    figure = plot_curves(record, shares, "Share of the weights (%)")
    figure.add_hline(y=100 / len(found), **dotted("equal shares"))
    figure.update_yaxes(rangemode="tozero")
    return figure


def plot_variance(record: Record) -> Figure:
    """The variance of the losses over the tasks, in training and on validation data."""
    figure = empty_figure("Epoch", "Variance over tasks (nats²)" if history.in_nats(record) else "Variance over tasks")
    training = history.over_epochs(record, lambda e: e.get("task_variance"))
    validation = history.over_epochs(record, lambda e: history.variance(e["validation_loss"].values()))
    for name, curve, role, dash in (
        ("training", training, "blue", "solid"),
        ("validation", validation, "vermilion", "dash"),
    ):
        figure.add_scatter(
            x=curve.epochs,
            y=curve.values,
            name=name,
            mode="lines+markers",
            line={"color": light(role), "width": 2.5, "dash": dash},
            marker={"size": 6},
            hovertemplate=f"{name}<br>epoch %{{x:.4~g}}: %{{y:.4~g}}<extra></extra>",
        )
    figure.update_yaxes(rangemode="tozero")
    _mark_best(figure, record)
    return figure


def _mark_best(figure: Figure, record: Record) -> None:
    """A dotted line at the epoch whose weights the model holds; whole epochs on the axis."""
    if len(record.get("epochs") or ()) <= 12:
        figure.update_xaxes(dtick=1)
    if history.best(record) is None:
        return
    figure.add_vline(x=record["best_epoch"], **dotted("the epoch that was kept"))
