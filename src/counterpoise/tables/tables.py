"""The tables of what was tried, points, ratios and searches, of a results dict; `counterpoise.tables.grid` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from counterpoise.tables.grid import Cell, Column, Table
from counterpoise.tables.numbers import number, ratio_list, span, with_interval
from counterpoise.tables.reading import (
    ENDS,
    MEANS,
    Results,
    Share,
    axes,
    measured_points,
    parts,
    picked,
    point_partition,
    point_shares,
    retained,
)

RETENTION_TOLD = (
    "Retention is minus the share of the tax that is left, the mean over abilities: 0 is PRE, −1 is all that each lost."
)
_ALIGNMENTS = {
    "imitation": "imitation: the likelihood of POST's good responses",
    "contrast": "contrast: the likelihood of good against bad responses to the same prompt",
    "reward": "the reward itself, its gradient from responses drawn at five points of the diagonal",
}


def healing_told(results: Results) -> str:
    """How a healed pick was made, what that cost, and where it lies; "" where nothing was healed."""
    told = results.get("healed")
    if not told:
        return ""
    rows = {row["name"]: row for row in told["points"]}
    row = rows.get(str(results.get("pick")))
    at = (
        f" The pick, {row['name']}, lies {number(row['line']['distance'], 2)} times |POST - PRE| beside the line between them, "
        f"nearest to the plain average of ratio {number(row['line']['nearest'], 2)}."
        if row
        else " None of its points was picked."
    )
    return (
        f"{told['start']} was healed: it answered alignment prompts and questions of the abilities, and learned on its own "
        f"answers from POST and from PRE ({told['settings']['divergence']} divergence, {told['settings']['steps']} steps at "
        f"most). That took {told['drawn']:,} tokens drawn, {told['trained']:,} trained on, and {number(told['seconds'], 0)} "
        f"seconds.{at}"
    )


def healing_table(results: Results) -> Table:
    """The points of a healing: what each side's validation prompts say of it, and what it cost."""
    columns = (
        Column("point", lambda r: Cell(r["name"]), False),
        Column("nats/token to POST", lambda r: Cell(number(r["align"], 4))),
        Column("nats/token to PRE", lambda r: Cell(number(r["keep"], 4))),
        Column("tokens drawn", lambda r: Cell(number(r["drawn"], 0))),
        Column("trained on", lambda r: Cell(number(r["trained"], 0))),
        Column("seconds", lambda r: Cell(number(r["seconds"], 1))),
        Column("beside the line", lambda r: Cell(number(r["line"]["distance"], 2))),
    )
    note = (
        "Divergences on validation prompts, the student's own answers: from POST where alignment is asked, from PRE where "
        "abilities are. Beside the line: distance from the nearest plain average, in |POST - PRE|. Costs are of each stretch."
    )
    return Table(columns, tuple((results.get("healed") or {}).get("points") or ()), (note,))


def ratio_table(shares: Sequence[Share], rest: Mapping[str, Any] | None = None, mean: float | None = None) -> Table:
    """The share of the update that each block keeps, and the tensors outside the blocks."""
    rows = list(shares)
    if rest and rest.get("tensors") and mean is not None:
        rows.append(Share(f"outside the blocks ({rest.get('policy') or 'mean'})", mean, (), rest.get("parameters")))
    columns = [Column("block", lambda s: Cell(s.block), False), Column("ratio", lambda s: Cell(number(s.ratio, 3)))]
    if any(s.parameters is not None for s in rows):
        columns.append(Column("parameters", lambda s: Cell(number(s.parameters, 0))))
    return Table(tuple(columns), tuple(rows))


def pick_ratios(results: Results) -> Table:
    """The ratios of the pick."""
    point = picked(results)
    if point is None:
        return ratio_table(())
    return ratio_table(point_shares(results, point), point_partition(results, point).get("rest"), point.get("mean"))


def measured(results: Results) -> Table:
    """Every point that was measured, part by part."""
    rows = [p for part in parts(results) for p in measured_points(results, part)]
    columns = (
        Column("point", lambda p: Cell(str(p["name"]), "the pick" if p["name"] == results.get("pick") else ""), False),
        Column("part", lambda p: Cell(str(p.get("part") or "")), False),
        Column("ratios", lambda p: Cell("" if p["method"] in ENDS else ratio_list(p.get("ratios") or [])), False),
        Column("reward", lambda p: Cell(*with_interval(p.get("reward") or {}))),
        *(Column(a, partial(_retained, a)) for a in axes(results) if a in MEANS),
        Column("on the front", lambda p: Cell("yes" if p.get("on_front") else "")),
    )
    return Table(columns, tuple(rows), (RETENTION_TOLD,), lambda p: not p.get("on_front"))


def search_table(results: Results) -> Table:
    """What each search found, and how fast."""
    columns = (
        Column("mean", lambda s: Cell(number(s["mean"], 2))),
        Column("ratios", lambda s: Cell(ratio_list(s.get("ratios") or [])), False),
        Column("passes", lambda s: Cell(number(s.get("passes"), 0))),
        Column("proxy loss", lambda s: Cell(_descent(s.get("trace") or []))),
        Column("converged", lambda s: Cell("yes" if s.get("converged") else "no"), False),
    )
    note = (
        "Proxy loss: nats per token of POST's good responses, at equal ratios and at the ratios found; lower is better."
    )
    return Table(columns, tuple(results.get("search") or ()), (note,))


def race_table(results: Results) -> Table:
    """One row a candidate: how many prompts it ran, whether its abilities were measured, what it kept of the gain."""
    columns = (
        Column("candidate", lambda r: Cell(str(r["name"])), False),
        Column("prompts", lambda r: Cell(number(r["prompts"], 0))),
        Column("abilities", lambda r: Cell("measured" if r["abilities"] else "–"), False),
        Column("of the gain, when last seen", lambda r: Cell(f"{r['kept']:.0%}")),
    )
    return Table(columns, tuple(results.get("race") or ()))


def two_sided_table(results: Results) -> Table:
    """The two-sided search, one row a search and lambda: both sides, the ratio outside the layers, the passes."""
    found = results.get("two_sided") or {}
    sets = list(found.get("sets") or ())
    columns = [
        Column("search", lambda r: Cell(str(r["how"])), False),
        Column("lambda", lambda r: Cell(number(r["lambda"], 2))),
        Column("alignment lost", partial(_side, None)),
        *(Column("of what PRE says" if sets == ["pre"] else f"of {s}", partial(_side, s)) for s in sets),
        *([Column("weighs most", _heaviest, False)] if found.get("rho") else []),
        Column("ratios", partial(_spread, (found.get("partition") or {}).get("blocks") or []), False),
        Column("passes", lambda r: Cell(number(r.get("passes"), 0))),
        Column("converged", lambda r: Cell("yes" if r.get("converged") else "no"), False),
    ]
    return Table(tuple(columns), tuple(found.get("rows") or ()), tuple(_two_sided_notes(found)))


def files(results: Results) -> Table:
    """sha256 of every input file."""
    inputs = results.get("inputs") or {}
    rows = [(s.upper(), n, h) for s, side in inputs.items() for n, h in ((side or {}).get("sha256") or {}).items()]
    columns = (
        Column("", lambda r: Cell(r[0]), False),
        Column("file", lambda r: Cell(r[1], code=True), False),
        Column("sha256", lambda r: Cell(str(r[2]), code=True), False),
    )
    return Table(columns, tuple(rows))


def _retained(axis: str, point: Mapping[str, Any]) -> Cell:
    return Cell(*with_interval(retained(point, axis) or {}))


def _descent(trace: Sequence[float]) -> str:
    return f"{number(trace[0], 4)} → {number(min(trace), 4)}" if trace else ""


def _side(name: str | None, row: Mapping[str, Any]) -> Cell:
    """What a side lost (alignment, or the set of that name); where a model says otherwise, the model's value beside it."""
    model = row["alignment"] if name is None else (row.get("retention") or {}).get(name)
    measured = row.get("measured")
    if measured is None:
        return Cell(number(model, 3))
    true = measured["alignment"] if name is None else measured["retention"].get(name)
    return Cell(number(true, 3), f"model {number(model, 3)}")


def _heaviest(row: Mapping[str, Any]) -> Cell:
    of = row.get("shares") or {}
    most = max(of, key=of.__getitem__, default="")
    return Cell(f"{most} {number(of[most], 2)}" if most else "")


def _spread(blocks: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> Cell:
    """The range over the layers, and the ratio outside them."""
    pairs = list(zip(blocks, row["ratios"], strict=False))
    inside = [r for b, r in pairs if b.get("layers")]
    outside = [f", outside {number(r, 2)}" for b, r in pairs if not b.get("layers")]
    return Cell("".join([span(inside, 2) if inside else "", *outside]))


def _two_sided_notes(found: Mapping[str, Any]) -> list[str]:
    alignment = found.get("alignment")
    notes = [
        f"Alignment is {_ALIGNMENTS.get(str(alignment), alignment)}. Lost: 0 at POST and 1 at PRE; of "
        "what PRE says, 0 at PRE and 1 at POST. Each lambda minimises alignment lost + lambda × the rest.",
        f"The path is a model of both sides from {found.get('passes')} passes on the diagonal, where it misses what was "
        f"measured by at most {number(found.get('misfit'), 3)}; the exact search descends the sides themselves.",
    ]
    if found.get("rho"):
        ball = f"a KL ball of radius {number(found['rho'], 2)} around equal weights"
        notes.append(f"Retention is the worst mixture of the sets within {ball}.")
    if found.get("left_out"):
        notes.append(f"Left out, because POST loses nothing there: {', '.join(found['left_out'])}.")
    return notes
