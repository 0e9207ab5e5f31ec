"""The tables of `counterpoise tax --from`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from counterpoise.tables.grid import Cell, Column, Table, without_detail
from counterpoise.tables.numbers import MISSING, p_value, places, with_interval
from counterpoise.tables.shifts import changed, flip
from counterpoise.tables.taxes import difference_cell

Row = Mapping[str, Any]
_READ = (
    "Higher is better; tax is PRE minus POST. Brackets: 95 % intervals, items paired; bold: they leave out 0.",
    "Holm: p adjusted over the tasks. Lost / won: % of items from right to wrong / wrong to right, less what guessing alone "
    "would flip (seen: before that).",
)
_LIKELIHOODS = "Perplexities stand as log-likelihoods: minus the logarithm of lm-eval's number."


def taxes(result: Mapping[str, Any]) -> Table:
    """Every task, metric and group, with all intervals."""
    columns = (
        Column("task", lambda r: Cell(str(r["name"]), _of(r)), False),
        Column("metric", lambda r: Cell(_metric(r)), False),
        Column("PRE", lambda r: Cell(*with_interval(r["pre"], decimals=_decimals(r)))),
        Column("POST", lambda r: Cell(*with_interval(r["post"], decimals=_decimals(r)))),
        Column("tax", lambda r: difference_cell(r["tax"], _decimals(r))),
        Column("p", lambda r: Cell(p_value(r["tax"]["p"]), f"Holm {p_value(r['tax']['p_holm'])}")),
        Column("lost", flip("lost")),
        Column("won", flip("won")),
    )
    return Table(columns, tuple(result["tax"]), _notes(result), lambda r: r["up"] is None)


def brief_taxes(result: Mapping[str, Any]) -> Table:
    """The same for a terminal."""
    full = taxes(result)
    task, metric, pre, post, tax, *_ = full.columns

    def flipped(row: Row) -> Cell:
        return Cell(" / ".join(flip(key)(row).text for key in ("lost", "won")) if row["flips"] else MISSING)

    columns = (
        Column("", lambda r: Cell(task.read(r).text, metric.read(r).text), False),
        without_detail(pre),
        without_detail(post),
        tax,
        Column("p\nHolm", lambda r: Cell(p_value(r["tax"]["p"]), p_value(r["tax"]["p_holm"]))),
        Column("lost / won", flipped),
    )
    return replace(full, columns=columns)


def calibrations(result: Mapping[str, Any]) -> Table:
    """Calibration error and Brier score of both runs, and of a pick."""
    rows = tuple(result.get("calibration") or ())

    def score(key: str) -> Callable[[Row], Cell]:
        return lambda r: Cell(*with_interval(r[key], decimals=1))

    columns = [
        Column("calibration", lambda r: Cell(str(r["name"]), "ECE, %" if r["measure"] == "ece" else "Brier, %"), False),
        Column("PRE", score("pre")),
        Column("POST", score("post")),
        Column("POST − PRE", lambda r: difference_cell(r["rise"], 1)),
        Column("p", lambda r: Cell(p_value(r["rise"]["p"]))),
    ]
    if any("pick" in r for r in rows):
        pick = str(result.get("pick") or "pick")
        columns.append(Column(pick, lambda r: changed(r["pick"], r.get("pick_rise"), decimals=1)))
    notes = (
        "Lower is better. ECE (expected calibration error): how far the model's confidence in the choice that it finds "
        "likeliest is from how often that is right, ten bins. Brier: the squared error of the probabilities.",
    )
    return Table(tuple(columns), rows, notes)


def _notes(result: Mapping[str, Any]) -> tuple[str, ...]:
    some = any("perplexity" in r["metric"] or r["metric"] == "bits_per_byte" for r in result["tax"])
    return (*_READ, _LIKELIHOODS) if some else _READ


def _of(row: Row) -> str:
    return f"{row['items']:,} items" + (f", {row['tasks']} tasks by {row['weights']}" if "tasks" in row else "")


def _metric(row: Row) -> str:
    return ", ".join(
        filter(None, (str(row["metric"]), str(row["unit"]), "" if row["up"] is not None else "direction?"))
    )


def _decimals(row: Row) -> int:
    return max(places(row[k].get("low"), row[k].get("high")) for k in ("pre", "tax"))
