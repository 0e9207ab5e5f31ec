"""What a mean can hide, in words and tables: how far a model has gone from PRE, and which answers changed sides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from counterpoise.tables.grid import Cell, Column, Table
from counterpoise.tables.numbers import MISSING, number, p_value, with_interval
from counterpoise.tables.reading import Results
from counterpoise.tables.taxes import difference_cell, with_subtasks

Row = Mapping[str, Any]
_MEASURES = {
    "kl_own_answers": ("its answers surprise PRE by", "KL(model ‖ PRE)"),
    "kl_pre_answers": ("PRE's answers surprise it by", "KL(PRE ‖ model)"),
    "kl_pre_text": ("PRE's own text surprises it by", "KL(PRE ‖ model)"),
    "entropy": ("it hesitates at each token by", "entropy of its answers"),
    "distinct_2": ("variety of its answers, %", "different pairs of tokens"),
}
_DISTANCE = (
    "Surprise: how much likelier each token is to the model that wrote it than to the one that reads it. 0: no difference; "
    "0.1: 11 % likelier; 0.7: twice; 2.3: ten times (the mean logarithm, in nats a token, over the whole vocabulary). Answers "
    "are those to the prompts; PRE's own text is what it says after neutral openings.",
    "Hesitation: 0 is always sure of the next token, 0.7 a toss-up of two, 2.3 of ten. Variety is of answers cut to one length.",
    "Brackets: 95 % intervals. Bold: the change from PRE leaves out 0.",
)
_FLIPS = (
    "Percent of all items, less what guessing alone would flip; seen: before that, both ways. Brackets: 95 % intervals. p: "
    "whether as many went each way (McNemar), not adjusted for the number of rows.",
)


def likelier(results: Results) -> str:
    """One sentence for who never heard of a divergence; "" where it was not measured."""
    found = next((r.get("post") for r in results.get("distance") or () if r["measure"] == "kl_own_answers"), None)
    if not found:
        return ""
    value, low, high = (number(math.exp(min(found[k], 700.0)), 2) for k in ("value", "low", "high"))
    return f"Each token of POST's answers is, in the mean, {value} [{low}, {high}] times as likely to POST as to PRE."


def distances(results: Results) -> Table:
    """How far POST and the pick are from PRE, and how varied their answers are."""
    rows = tuple(results.get("distance") or ())
    names = {"pre": "PRE", "post": "POST", "pick": str(results.get("pick") or "pick")}
    columns = [
        Column(title, lambda r, key=key: changed(r.get(key), r.get(f"{key}_change")) if r.get(key) else Cell("0"))  # type: ignore[misc]
        for key, title in names.items()
        if any(r.get(key) for r in rows)
    ]
    return Table((Column("", lambda r: Cell(*_MEASURES[r["measure"]]), False), *columns), rows, _DISTANCE)


def flips(results: Results) -> Table:
    """Items that went from right to wrong and from wrong to right, PRE to POST and PRE to the pick."""
    names = {"flips": "POST", "pick_flips": str(results.get("pick") or "pick")}
    rows = tuple((r, key) for r in with_subtasks(results) for key in names if r.get(key))
    columns = (
        Column("", lambda r: Cell(str(r[0]["name"]), f"{r[0]['metric']}, {r[0]['items']:,} items"), False),
        Column("PRE to", lambda r: Cell(names[r[1]]), False),
        Column("right to wrong", lambda r: Cell(*with_interval(r[0][r[1]]["lost"], decimals=1))),
        Column("wrong to right", lambda r: Cell(*with_interval(r[0][r[1]]["won"], decimals=1))),
        Column("seen", lambda r: Cell(" / ".join(number(r[0][r[1]][way]["seen"], 1) for way in ("lost", "won")))),
        Column("p", lambda r: Cell(p_value(r[0][r[1]]["p"]))),
    )
    return Table(columns, rows, _FLIPS, lambda r: bool(r[0].get("at_floor")))


def flip(way: str) -> Callable[[Row], Cell]:
    """A cell of flips that way, with what was seen where guessing was taken off."""

    def cell(row: Row) -> Cell:
        if not (found := row.get("flips")):
            return Cell(MISSING)
        value, span = with_interval(found[way], decimals=1)
        seen = f"seen {number(found[way]['seen'], 1)}" if found["by_chance"] else ""
        return Cell(value, " ".join(filter(None, (span, seen))))

    return cell


def changed(found: Row | None, change: Row | None, decimals: int | None = None) -> Cell:
    """A value with its interval, bold where its change leaves out 0."""
    if not found:
        return Cell(MISSING)
    return Cell(*with_interval(found, decimals=decimals), strong=bool(change) and difference_cell(change or {}).strong)
