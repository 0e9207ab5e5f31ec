"""The tables of what a model lost: each ability's tax, of a results dict; `counterpoise.tables.grid` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from counterpoise.statistics.bootstrap import over_runs
from counterpoise.tables.grid import Cell, Column, Table, as_rich, without_detail
from counterpoise.tables.numbers import number, p_value, places, with_interval
from counterpoise.tables.reading import (
    HELD_OUT,
    KINDS,
    Results,
    counted,
    kind_of,
    measured_points,
)

if TYPE_CHECKING:
    from rich.table import Table as RichTable

TaxRow = Mapping[str, Any]


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


def tax_rich(results: Results) -> RichTable:
    """The tax table for a terminal of 80 columns; `results` may hold nothing but "tax"."""
    full = ability_taxes(results)
    name, _, *numbers = full.columns

    def named(row: TaxRow) -> Cell:
        cell = name.read(row)
        return Cell(f"{cell.text} (at floor)" if cell.detail else cell.text, _metric(row).partition(",")[0])

    differences = ("tax", "tax left")
    columns = [c if c.title in differences else without_detail(c) for c in numbers if c.title != "p"]
    note = "Higher is better; tax is PRE minus POST. Brackets: 95 % intervals; bold: they leave out 0."
    return as_rich(replace(full, columns=(Column("", named, False), *columns), notes=(note,)))


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


def _negated(found: Mapping[str, Any]) -> dict[str, float]:
    """A retention as a tax."""
    return {"value": -found["value"], "low": -found["high"], "high": -found["low"]}
