"""The tables of a results dict; `counterpoise.tables.grid` writes them for the terminal, in Markdown and in html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from counterpoise.statistics.bootstrap import over_runs
from counterpoise.tables.grid import Cell, Column, Table, as_rich
from counterpoise.tables.numbers import number, p_value, places, ratio_list, span, with_interval
from counterpoise.tables.reading import (
    ENDS,
    HELD_OUT,
    KINDS,
    MEANS,
    REFERENCE,
    Results,
    Share,
    Volume,
    axes,
    counted,
    kind_of,
    measured_points,
    method_volumes,
    parts,
    picked,
    point_partition,
    point_shares,
    retained,
)

if TYPE_CHECKING:
    from rich.table import Table as RichTable

TaxRow = Mapping[str, Any]
VOLUME = (
    "The area under each method's front between PRE's reward and POST's retention; the rectangle that PRE and POST span "
    "counts as 1."
)
EQUALLY_MANY = (
    f"More points make a larger area, so that a method is compared with {REFERENCE} at as many points as it has, the mean over "
    f"all choices of them; not with fewer."
)
_ALIGNMENTS = {
    "imitation": "imitation: the likelihood of POST's good responses",
    "contrast": "contrast: the likelihood of good against bad responses to the same prompt",
    "reward": "the reward itself, its gradient from responses drawn at five points of the diagonal",
}


def ability_taxes(results: Results) -> Table:
    """PRE, POST and the pick on held-out data, the tax and what the pick leaves of it."""
    rows = with_subtasks(results)
    names = _names(rows)
    has_pick = any(r.get("pick") for r in rows)
    notes = [
        "Higher is better in every row. Tax is PRE minus POST: positive is lost, negative is gained.",
        "Brackets: 95 % intervals. Bold: the interval of a difference leaves out 0. p is two-sided, the items paired, "
        "not adjusted for the number of rows.",
    ]
    if any(r.get("at_floor") for r in rows):
        notes.append(
            "At floor: PRE is not significantly above chance, so there is nothing to lose; kept out of the mean."
        )
    columns = [
        Column("", lambda r: Cell(names[id(r)], "at floor" if names[id(r)] and r.get("at_floor") else ""), False),
        Column("metric", lambda r: Cell(_metric(r), f"{r['items']:,} items" if r.get("items") else ""), False),
        Column("PRE", partial(_score, "pre")),
        Column("POST", partial(_score, "post")),
        *([Column(str(results.get("pick") or "pick"), partial(_score, "pick"))] if has_pick else []),
        Column("tax", partial(_difference, "tax")),
        Column("p", partial(_p, "tax")),
    ]
    if has_pick:
        columns += [Column("tax left", partial(_difference, "remaining")), Column("p", partial(_p, "remaining"))]
    return Table(tuple(columns), tuple(rows), tuple(notes), lambda r: bool(r.get("at_floor")))


def both_kinds(results: Results) -> Table:
    """Each ability's tax by likelihood and by accuracy side by side, what the pick leaves of either, and their means."""
    sides: dict[str, dict[str, TaxRow]] = {}
    for row in results.get("tax") or ():
        if row["name"] != "reward":
            sides.setdefault(row["name"], {}).setdefault(kind_of(str(row.get("unit") or "")), row)
    points = {p["name"]: p.get("retention_by") or {} for p in measured_points(results, HELD_OUT)}
    models = {"POST": "tax", **({str(results["pick"]): "remaining"} if results.get("pick") else {})}
    count = len(counted(results, KINDS[0]))

    def taxed(model: str, kind: str, row: str) -> Cell:
        if row:
            found = sides[row].get(kind)
            return _difference(models[model], found) if found else Cell(number(None, 2))
        kept = (points.get(model) or {}).get(kind)
        return difference_cell(_negated(kept)) if kept else Cell(number(None, 2))

    columns = [
        Column(f"{'tax' if model == 'POST' else f'left by {model}'}, {kind}", partial(taxed, model, kind))
        for model in models
        for kind in KINDS
    ]
    note = (
        "Likelihood: how probable right answers are, in nats. Accuracy: whether answers are right (accuracy, exact match, "
        "BLEU), in points. Positive is lost; bold: the interval leaves out 0. A loss in one is not yet a loss in the other. "
        "Mean: of the abilities measured both ways, in shares of each one's own loss."
    )
    rows = (*sides, *([""] if count else []))
    floor = {n for n, of in sides.items() if any(r.get("at_floor") for r in of.values())}
    name = Column("", lambda row: Cell(row or f"mean of {count}"), False)
    return Table((name, *columns), rows, (note,), lambda row: row in floor)


def against_ma(results: Results) -> Table:
    """The pick minus MA at the same mean, on held-out data."""
    units = {(r["name"], r.get("metric")): r.get("unit") for r in results.get("tax") or ()}
    rows = [{"unit": units.get((r["name"], r.get("metric"))), **r} for r in results.get("pick_against_ma") or ()]
    names = _names(rows)
    columns = (
        Column("", lambda r: Cell(names[id(r)]), False),
        Column("metric", lambda r: Cell(_metric(r)), False),
        Column(f"pick minus {results.get('against') or 'MA'}", partial(_difference, "difference")),
        Column("p", partial(_p, "difference")),
    )
    return Table(columns, tuple(rows), ("Positive: the pick is better.",))


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


def volume_table(results: Results) -> Table:
    """Hypervolume of each method's front, the largest first."""
    recorded, found = results.get("hypervolume") or {}, method_volumes(results) or {}
    rows = sorted(recorded.items(), key=lambda item: -(item[1] if item[1] is not None else float("-inf")))
    held: dict[str, Volume] = {m: found[m] for m, _ in rows if m in found}
    columns = [
        Column("method", lambda r: Cell(str(r[0])), False),
        Column("hypervolume", lambda r: Cell(number(r[1], 3))),
    ]
    if held:
        columns += [
            Column("points", lambda r: Cell(number(held[r[0]].points, 0) if r[0] in held else "")),
            Column(
                f"{REFERENCE}'s of as many", lambda r: Cell(number(held[r[0]].reference, 3) if r[0] in held else "")
            ),
        ]
    note = f"{VOLUME} {EQUALLY_MANY} From validation scores, without an interval: small differences may be noise."
    return Table(tuple(columns), tuple(rows), (note,))


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
    return Table(columns, tuple(rows), quiet=lambda p: not p.get("on_front"))


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


def tax_rich(results: Results) -> RichTable:
    """The tax table for a terminal of 80 columns; `results` may hold nothing but "tax"."""
    rows = with_subtasks(results)
    names = _names(rows)

    def name(row: TaxRow) -> Cell:
        floor = " (at floor)" if names[id(row)] and row.get("at_floor") else ""
        return Cell(names[id(row)] + floor, _metric(row).partition(",")[0])

    def bare(key: str, row: TaxRow) -> Cell:
        return replace(_score(key, row), detail="")

    columns = [Column("", name, False), Column("PRE", partial(bare, "pre")), Column("POST", partial(bare, "post"))]
    has_pick = any(r.get("pick") for r in rows)
    if has_pick:
        pick = str(results.get("pick") or "pick")
        # A long name in one line would starve the other columns.
        columns.append(Column(pick if len(pick) <= 10 else pick.replace(" ", "\n", 1), partial(bare, "pick")))
    columns.append(Column("tax", partial(_difference, "tax")))
    if has_pick:
        columns.append(Column("tax left", partial(_difference, "remaining")))
    note = "Higher is better; tax is PRE minus POST. Brackets: 95 % intervals; bold: they leave out 0."
    return as_rich(Table(tuple(columns), tuple(rows), (note,), lambda r: bool(r.get("at_floor"))))


def difference_cell(found: Mapping[str, Any], decimals: int | None = None) -> Cell:
    """A difference with its interval; bold where that leaves out 0."""
    low, high = found.get("low"), found.get("high")
    clear = low is not None and high is not None and (low > 0 or high < 0)
    return Cell(*with_interval(found, signed=True, decimals=decimals), strong=clear)


def over_runs_cell(values: Sequence[float], *, signed: bool = True) -> Cell:
    """The mean of training runs with Student's interval over them, of a difference with its p; empty with fewer than two."""
    found = over_runs(values)
    if found is None:
        return Cell("")
    value, interval = with_interval(found._asdict(), signed=signed)
    p = f", p {p_value(found.p)}" if signed else ""
    return Cell(value, f"{interval}{p}, {len(values)} runs", strong=signed and (found.low > 0 or found.high < 0))


def with_subtasks(results: Results) -> list[TaxRow]:
    """The tax, each group of tasks with its subtasks beneath it."""
    named = (
        [row, *({**s, "name": f"· {s['name']}"} for s in row.get("subtasks") or ())] for row in results.get("tax") or ()
    )
    return [row for rows in named for row in rows]


def _names(rows: Sequence[TaxRow]) -> dict[int, str]:
    """id of a row -> the ability's name; "" where the row above has the same."""
    return {id(r): "" if i and rows[i - 1]["name"] == r["name"] else str(r["name"]) for i, r in enumerate(rows)}


def _metric(row: TaxRow) -> str:
    metric, unit = str(row.get("metric") or ""), str(row.get("unit") or "")
    metric = "" if metric == row["name"] else metric
    return unit if not metric or metric.lower() == unit.lower() else ", ".join(filter(None, (metric, unit)))


def _decimals(row: TaxRow) -> int | None:
    """One number of decimals for a whole row: what its narrowest interval earns."""
    found = [r for key in ("pre", "tax", "difference") if (r := row.get(key))]
    return max((places(r.get("low"), r.get("high")) for r in found), default=None)


def _score(key: str, row: TaxRow) -> Cell:
    return Cell(*with_interval(row.get(key) or {}, decimals=_decimals(row)))


def _difference(key: str, row: TaxRow) -> Cell:
    return difference_cell(row.get(key) or {}, _decimals(row))


def _p(key: str, row: TaxRow) -> Cell:
    return Cell(p_value((row.get(key) or {}).get("p")))


def _retained(axis: str, point: Mapping[str, Any]) -> Cell:
    return Cell(*with_interval(retained(point, axis) or {}))


def _negated(found: Mapping[str, Any]) -> dict[str, float]:
    """A retention as a tax."""
    return {"value": -found["value"], "low": -found["high"], "high": -found["low"]}


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
    neighbours = found.get("neighbours") or ()
    if refused := sum(not n["used"] for n in neighbours):
        notes.append(
            f"{refused} of {len(neighbours)} neighbours were too far away to lend their samples (effective "
            "share of the samples below a tenth)."
        )
    return notes
