"""Tables say the same in a terminal, in Markdown and in html; the doctests of the package hold."""

from __future__ import annotations

import doctest
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from counterpoise.language import divergence
from counterpoise.report import plots
from counterpoise.statistics import paired
from counterpoise.tables import logs, numbers, reading, shifts, tables, taxes
from counterpoise.tables.grid import Cell, Column, Table, as_html, as_markdown, as_rich
from report import made

TABLES = [
    taxes.ability_taxes, taxes.both_kinds, taxes.against_ma, tables.pick_ratios, tables.measured,
    tables.search_table, tables.files, shifts.distances, shifts.flips, logs.calibrations,
]  # fmt: skip


class Rows(HTMLParser):
    """The texts of a table's cells, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


def from_markdown(text: str) -> list[list[str]]:
    """Cells of a GitHub table, markup removed."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    found = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    plain = [[re.sub(r"\*\*|(?<!\\)`|\\(?=[\\`*_|\[\]])", "", c) for c in row] for row in found]
    return [
        [c.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for c in r] for r in [plain[0], *plain[2:]]
    ]


def on_terminal(table: Table, width: int = 300) -> str:
    console = Console(file=io.StringIO(), width=width, no_color=True)
    console.print(as_rich(table))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", TABLES, ids=lambda make: make.__name__)
def test_the_three_forms_agree(make: Callable[[Any], Table]) -> None:
    table = make(made.results())
    expected = [[c.title for c in table.columns]]
    expected += [[f"{c.text} {c.detail}".strip() for c in row] for row in table.cells()]
    assert len(expected) > 2
    assert [[cell.strip() for cell in row] for row in Rows(as_html(table, "title")).rows] == expected
    assert from_markdown(as_markdown(table)) == expected
    terminal = on_terminal(table)
    for row in table.cells():
        assert all(part in terminal for cell in row for part in (cell.text, cell.detail))


def test_a_cell_cannot_break_out_of_its_table() -> None:
    bad = made.hostile()["verdict"]
    table = Table(
        (Column(bad, lambda r: Cell(r), False), Column("n", lambda r: Cell("1", strong=True))), (bad, "[red]x[/red]")
    )
    assert Rows(as_html(table, "title")).rows == [[bad, "n"], [bad, "1"], ["[red]x[/red]", "1"]]
    flat = bad.replace("\n", " ")
    assert from_markdown(as_markdown(table)) == [[flat, "n"], [flat, "1"], ["[red]x[/red]", "1"]]
    assert "<" not in as_markdown(table)
    assert "[red]x[/red]" in on_terminal(table)


def test_bold_is_for_intervals_that_leave_out_zero() -> None:
    table = taxes.ability_taxes(made.results())
    clear = {r["name"] for r in table.rows if r["tax"]["low"] > 0 or r["tax"]["high"] < 0}
    column = [c.title for c in table.columns].index("tax")
    bold = {r["name"] for r, cells in zip(table.rows, table.cells(), strict=True) if cells[column].strong}
    assert bold == clear == {"reward", "arc_easy", "piqa", "lambada", "multi30k"}


def test_both_measures_of_an_ability_stand_in_one_row() -> None:
    results = made.results()
    for point in results["points"]:
        value = {"PRE": 0.0, "POST": -0.9}.get(point["name"], -0.3)
        kept = {"value": value, "low": value - 0.1, "high": value + 0.2}
        point["retention_by"] = {"likelihood": kept, "accuracy": {k: v / 3 for k, v in kept.items()}}
    table = taxes.both_kinds(results)
    titles = ["", "tax, likelihood", "tax, accuracy", "left by HMA 0.6, likelihood", "left by HMA 0.6, accuracy"]
    assert [c.title for c in table.columns] == titles
    cells = dict(zip(table.rows, table.cells(), strict=True))
    assert list(cells) == [*made.ABILITIES, ""]
    assert [c.text for c in cells["lambada"]] == ["lambada", "+0.171", "–", "+0.072", "–"]
    assert [c.strong for c in cells["arc_easy"]] == [False, True, True, True, False]
    assert [c.text for c in cells[""]] == ["mean of 3", "+0.90", "+0.300", "+0.30", "+0.100"]
    assert cells[""][1].detail == "[+0.70, +1.00]"  # a tax is minus a retention
    assert [r for r in table.rows if table.quiet(r)] == ["boolq"]
    assert not taxes.both_kinds({})


def test_the_tax_fits_a_terminal_of_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, no_color=True)
    console.print(taxes.tax_rich(made.results()))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for whole in ("arc_easy", "multi30k", "−1.310", "+0.084", "[+0.047, +0.121]", "HMA 0.6", "tax left"):
        assert whole in shown


@pytest.mark.parametrize("results", [made.stopped(), {}], ids=["stopped", "nothing"])
def test_without_a_pick_there_are_no_columns_for_it(results: dict[str, object]) -> None:
    assert "tax left" not in as_markdown(taxes.ability_taxes(results))
    assert not any((tables.pick_ratios(results), taxes.against_ma(results), tables.search_table(results)))


def test_what_means_hide_fits_a_terminal_of_80_columns() -> None:
    for make in (shifts.distances, shifts.flips, logs.calibrations):
        table = make(made.results())
        shown = on_terminal(table, 80)
        assert "…" not in shown
        assert all(part in shown for row in table.cells() for cell in row[1:] for part in (cell.text, cell.detail))


def test_a_change_is_bold_where_its_own_interval_leaves_out_zero() -> None:
    cells = {row[0].text: row[1:] for row in shifts.distances(made.results()).cells()}
    assert [c.strong for c in cells["variety of its answers, %"]] == [False, True, False]
    assert cells["its answers surprise PRE by"][0].text == "0"
    assert "1.16 [1.13, 1.18] times as likely to POST as to PRE" in shifts.likelier(made.results())


@pytest.mark.parametrize("module", [numbers, plots, paired, divergence, reading], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
