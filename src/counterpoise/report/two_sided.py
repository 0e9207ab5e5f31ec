"""The two-sided search on the page: what each lambda loses on both sides, and its ratios layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from counterpoise.report.marks import step_line
from counterpoise.report.page import Figures, plot_box, section, spec
from counterpoise.report.palette import look_of
from counterpoise.report.plots import empty_figure
from counterpoise.tables.grid import Cell, Column, Table, as_html
from counterpoise.tables.numbers import number, span
from counterpoise.tables.reading import Results, block_shares
from counterpoise.tables.tables import Row

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_ALIGNMENTS = {
    "imitation": "imitation: the likelihood of POST's good responses",
    "contrast": "contrast: the likelihood of good against bad responses to the same prompt",
    "reward": "the reward itself, its gradient from responses drawn at five points of the diagonal",
}
_CAPTION = (
    "1 keeps all of the alignment update in a layer, 0 gives the layer back to PRE. Stronger lines: larger lambda, more of "
    "PRE asked for. What stands outside the layers has a ratio of its own, in the table."
)


def two_sided_section(results: Results, figures: Figures) -> str:
    """The section of the page, its figure put into `figures`; "" when there was no such search."""
    made = two_sided_table(results)
    if not made:
        return ""
    how = _how(results)
    figures["two-sided"] = {"": spec(plot_two_sided(results, how))}
    box = plot_box("two-sided", "Ratios of the two-sided search", [], f"{_CAPTION} Shown: {how}.", low=True)
    return section("The two-sided search", box + as_html(made))


def two_sided_table(results: Results) -> Table:
    """One row a search and lambda: both sides, the ratio outside the layers, the passes."""
    found = results.get("two_sided") or {}
    sets = list(found.get("sets") or ())
    columns = [
        Column("search", lambda r: Cell(str(r["how"])), False),
        Column("lambda", lambda r: Cell(number(r["lambda"], 2))),
        Column("alignment lost", lambda r: Cell(*_values(r, None))),
        *(_set_column(t, sets) for t in sets),
        *([Column("weighs most", lambda r: Cell(_heaviest(r)), False)] if found.get("rho") else []),
        Column("ratios", lambda r: Cell(_spread(found, r)), False),
        Column("passes", lambda r: Cell(number(r.get("passes"), 0))),
        Column("converged", lambda r: Cell("yes" if r.get("converged") else "no"), False),
    ]
    return Table(tuple(columns), tuple(found.get("rows") or ()), tuple(_notes(found)))


def plot_two_sided(results: Results, how: str) -> Figure:
    """The ratio of each layer for every lambda."""
    found = results.get("two_sided") or {}
    rows = sorted((r for r in found.get("rows") or () if r["how"] == how), key=lambda r: float(r["lambda"]))
    figure = empty_figure("Layer, from input to output", "Share of the update kept")
    for i, row in enumerate(rows):
        strength = 0.35 + 0.65 * (i + 1) / len(rows)
        of = block_shares(found.get("partition") or {}, row["ratios"])
        name = f"lambda {number(row['lambda'], 2)}"
        figure.add_trace(step_line(of, name, look_of(f"two-sided {how}").colour, 1.2 + 1.2 * strength, strength))
    figure.update_yaxes(range=[-0.04, 1.04], zeroline=False)
    return figure


def _how(results: Results) -> str:
    """The exact search where it was made, else the path."""
    rows = (results.get("two_sided") or {}).get("rows") or ()
    return "exact" if any(r["how"] == "exact" for r in rows) else "path"


def _values(row: Row, name: str | None) -> tuple[str, str]:
    """What was measured; where that differs from a model's value, the model's beside it."""
    model = row["alignment"] if name is None else (row.get("retention") or {}).get(name)
    measured = row.get("measured")
    if measured is None:
        return number(model, 3), ""
    true = measured["alignment"] if name is None else measured["retention"].get(name)
    return number(true, 3), f"model {number(model, 3)}"


def _set_column(name: str, sets: list[str]) -> Column:
    title = "of what PRE says" if sets == ["pre"] else f"of {name}"
    return Column(title, lambda r: Cell(*_values(r, name)))


def _heaviest(row: Row) -> str:
    of = row.get("shares") or {}
    most = max(of, key=of.__getitem__, default="")
    return f"{most} {number(of[most], 2)}" if most else ""


def _spread(found: Mapping[str, Any], row: Row) -> str:
    """The range over the layers, and the ratio outside them."""
    blocks = (found.get("partition") or {}).get("blocks") or []
    pairs = list(zip(blocks, row["ratios"], strict=False))
    inside = [r for b, r in pairs if b.get("layers")]
    outside = [r for b, r in pairs if not b.get("layers")]
    return (span(inside, 2) if inside else "") + "".join(f", outside {number(r, 2)}" for r in outside)


def _notes(found: Mapping[str, Any]) -> list[str]:
    notes = [
        f"Alignment is {_ALIGNMENTS.get(str(found.get('alignment')), found.get('alignment'))}. Lost: 0 at POST and 1 at PRE; of "
        "what PRE says, 0 at PRE and 1 at POST. Each lambda minimises alignment lost + lambda × the rest.",
        f"The path is a model of both sides from {found.get('passes')} passes on the diagonal, where it misses what was "
        f"measured by at most {number(found.get('misfit'), 3)}; the exact search descends the sides themselves.",
    ]
    if found.get("rho"):
        notes.append(
            f"Retention is the worst mixture of the sets within a KL ball of radius {number(found['rho'], 2)} around equal "
            "weights."
        )
    if found.get("left_out"):
        notes.append(f"Left out, because POST loses nothing there: {', '.join(found['left_out'])}.")
    refused = [n for n in found.get("neighbours") or () if not n["used"]]
    if refused:
        notes.append(
            f"{len(refused)} of {len(found['neighbours'])} neighbours were too far away to lend their samples (effective "
            "share of the samples below a tenth)."
        )
    return notes
