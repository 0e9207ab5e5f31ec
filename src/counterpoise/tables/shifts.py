"""What a mean can hide, in words and tables: how far a model has gone from PRE, and which answers changed sides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from counterpoise.tables.grid import Cell, Column, Table
from counterpoise.tables.numbers import MISSING, number, p_value, with_interval
from counterpoise.tables.reading import Results
from counterpoise.tables.tables import difference_cell, metric_of

Row = Mapping[str, Any]
_MEASURES = {
    "kl_own_answers": ("surprise of PRE at its answers", "KL(model ‖ PRE), answers to the prompts"),
    "kl_pre_answers": ("its surprise at PRE's answers", "KL(PRE ‖ model), answers to the prompts"),
    "kl_pre_text": ("its surprise at PRE's own text", "KL(PRE ‖ model), text that no prompt asked for"),
    "entropy": ("choice at each token", "entropy of the next token in its answers"),
    "distinct_2": ("variety of its answers", "different pairs of tokens among all pairs"),
}
_READ = (
    "Surprise: how much likelier a text's tokens are to the model that wrote it than to the other; 0 is no difference, 0.1 is "
    "11 % a token, 0.7 is twice, 2.3 is ten times (the mean logarithm, in nats). Exact over the whole vocabulary.",
    "Choice: 0 is always sure of the next token, 0.7 is a toss-up of two, 2.3 of ten. Variety is of answers cut to one length.",
    "Brackets: 95 % intervals over prompts. Bold: a change whose interval leaves out 0.",
)
_FLIPPED = (
    "Percent of all items, less what guessing alone would flip. Seen: before that is taken off. A mean that stands still can "
    "hide both.",
    "Brackets: 95 % intervals over items. p: whether as many went each way (McNemar), not adjusted for the number of rows.",
)


def likelier(results: Results) -> str:
    """One sentence for who never heard of a divergence; "" where it was not measured."""
    row = next((r for r in results.get("distance") or () if r["measure"] == "kl_own_answers"), None)
    if row is None or not row.get("post"):
        return ""
    value, low, high = (number(math.exp(min(row["post"][k], 700.0)), 2) for k in ("value", "low", "high"))
    return f"Each token of POST's answers is, in the mean, {value} [{low}, {high}] times as likely to POST as to PRE."


def distances(results: Results) -> Table:
    """How far POST and the pick are from PRE, and how varied their answers are."""
    rows = tuple(results.get("distance") or ())
    columns = [
        Column("", lambda r: Cell(*_MEASURES[r["measure"]]), False),
        Column("unit", lambda r: Cell(str(r["unit"])), False),
        *(Column(title, _score(key)) for key, title in (("pre", "PRE"), ("post", "POST"))),
        Column("POST − PRE", _change("post_change")),
    ]
    if any(r.get("pick") for r in rows):
        pick = str(results.get("pick") or "pick")
        columns += [Column(pick, _score("pick")), Column(f"{pick} − PRE", _change("pick_change"))]
    return Table(tuple(columns), rows, _READ)


def flips(results: Results) -> Table:
    """Items that went from right to wrong and from wrong to right, PRE to POST and PRE to the pick."""
    rows = tuple(r for r in results.get("tax") or () if r.get("flips"))
    pick = str(results.get("pick") or "pick")
    sides = {"flips": "POST", **({"pick_flips": pick} if any(r.get("pick_flips") for r in rows) else {})}
    columns = [Column("PRE →", lambda r: Cell(str(r["name"]), f"{metric_of(r)}, {r['items']:,} items"), False)]
    for key, title in sides.items():
        columns += [
            Column(f"{title}: right to wrong", flip("lost", key)),
            Column("wrong to right", flip("won", key)),
            Column("p", _p(key)),
        ]
    return Table(tuple(columns), rows, _FLIPPED, lambda r: bool(r.get("at_floor")))


def flip(way: str, key: str = "flips") -> Callable[[Row], Cell]:
    """A cell of flips that way, with what was seen where guessing was taken off."""

    def cell(row: Row) -> Cell:
        if not row.get(key):
            return Cell(MISSING)
        found = row[key][way]
        value, span = with_interval(found, decimals=1)
        seen = f"seen {number(found['seen'], 1)}" if row[key].get("chance") else ""
        return Cell(value, " ".join(filter(None, (span, seen))))

    return cell


def _score(key: str) -> Callable[[Row], Cell]:
    return lambda row: Cell(*with_interval(row[key])) if row.get(key) else Cell(MISSING)


def _change(key: str) -> Callable[[Row], Cell]:
    return lambda row: difference_cell(row[key]) if row.get(key) else Cell("")


def _p(key: str) -> Callable[[Row], Cell]:
    return lambda row: Cell(p_value(row[key]["p"]) if row.get(key) else MISSING)
