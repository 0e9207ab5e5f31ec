"""What each candidate of a race cost."""

from __future__ import annotations

from counterpoise.tables.grid import Cell, Column, Table
from counterpoise.tables.numbers import number
from counterpoise.tables.reading import Results


def race_table(results: Results) -> Table:
    """One row a candidate: how many prompts it ran, whether its abilities were measured, what it kept of the gain."""
    columns = (
        Column("candidate", lambda r: Cell(str(r["name"])), False),
        Column("prompts", lambda r: Cell(number(r["prompts"], 0))),
        Column("abilities", lambda r: Cell("measured" if r["abilities"] else "–"), False),
        Column("of the gain, when last seen", lambda r: Cell(f"{r['kept']:.0%}")),
    )
    return Table(columns, tuple(results.get("race") or ()))
