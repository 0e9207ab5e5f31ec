"""A table described once and written three ways: for the terminal, in Markdown, in html."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable


LONG = 36  # characters; a longer text may be broken into lines on the page


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table.

    Attributes:
        detail: an interval or remark, written smaller beside or below the text.
        strong: stands out, for a difference whose interval leaves out 0.
        code: a name or hash that a program reads.
    """

    text: str
    detail: str = ""
    strong: bool = False
    code: bool = False


@dataclass(frozen=True)
class Column:
    """A title and how to fill a cell from a row."""

    title: str
    read: Callable[[Any], Cell]
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Columns, rows, and the notes needed to read them.

    Attributes:
        quiet: rows to be written in a softer colour.
    """

    columns: tuple[Column, ...]
    rows: tuple[Any, ...]
    notes: tuple[str, ...] = ()
    quiet: Callable[[Any], bool] = lambda row: False

    def cells(self) -> list[list[Cell]]:
        """All cells, row by row."""
        return [[column.read(row) for column in self.columns] for row in self.rows]

    def __bool__(self) -> bool:
        return bool(self.rows)


def without_detail(column: Column) -> Column:
    """The bare numbers, for a narrow table; a long title is broken, since in one line it would starve the other columns."""
    title = column.title if len(column.title) <= 10 else column.title.replace(" ", "\n", 1)
    return Column(title, lambda row: replace(column.read(row), detail=""), column.numeric)


def as_rich(table: Table) -> RichTable:
    """For the terminal; intervals stand below their numbers."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(
        box=box.SIMPLE_HEAD,
        caption="\n".join(table.notes) or None,
        caption_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    for column in table.columns:
        made.add_column(
            Text(column.title), justify="right" if column.numeric else "left", no_wrap=column.numeric, overflow="fold"
        )
    for row, cells in zip(table.rows, table.cells(), strict=True):
        texts = []
        for cell in cells:
            text = Text(_plain(cell.text), style="bold" if cell.strong else "")
            texts.append(text.append(f"\n{cell.detail}", style="not bold dim") if cell.detail else text)
        made.add_row(*texts, style="dim" if table.quiet(row) else None)
    return made


def as_markdown(table: Table) -> str:
    """A GitHub table, its notes below; nothing in a cell can break the table or become markup."""
    lines = [
        _line(c.title and _escaped(c.title) for c in table.columns),
        _line("---:" if c.numeric else ":---" for c in table.columns),
    ]
    for cells in table.cells():
        lines.append(_line(_markdown_cell(c) for c in cells))
    return "\n".join([*lines, *(f"\n{_escaped(note)}" for note in table.notes)])


def as_html(table: Table, title: str) -> str:
    """A table element in a box that scrolls sideways, its notes below; the title is read out, a heading shows it."""
    head = "".join(f"<th scope=col{_classes(c, c.title)}>{html.escape(c.title)}</th>" for c in table.columns)
    body = "".join(
        f"<tr{' class=quiet' if table.quiet(row) else ''}>"
        + "".join(_html_cell(c, cell, i == 0) for i, (c, cell) in enumerate(zip(table.columns, cells, strict=True)))
        + "</tr>"
        for row, cells in zip(table.rows, table.cells(), strict=True)
    )
    few = " class=few" if len(table.columns) < 5 else ""
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in table.notes)
    name = html.escape(title)
    opened = f'<div class=scroll role=region aria-label="{name}" tabindex=0><table{few}><caption>{name}</caption>'
    return f"{opened}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}"


def _html_cell(column: Column, cell: Cell, first: bool) -> str:
    tag = "th scope=row" if first else "td"
    text = html.escape(cell.text)
    text = f"<code>{text}</code>" if cell.code else f"<strong>{text}</strong>" if cell.strong else text
    detail = f" <small>{html.escape(cell.detail)}</small>" if cell.detail else ""
    return f"<{tag}{_classes(column, cell.text)}>{text}{detail}</{tag.split()[0]}>"


def _classes(column: Column, text: str) -> str:
    names = " ".join(["number"] * column.numeric + ["long"] * (len(text) > LONG))
    return f' class="{names}"' if names else ""


def _markdown_cell(cell: Cell) -> str:
    text = _escaped(cell.text)
    text = f"`{text}`" if cell.code and text and "`" not in text and "&" not in text else text
    text = f"**{text}**" if cell.strong else text
    return f"{text} {cell.detail}".strip()


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", html.escape(_plain(text), quote=False))


def _plain(text: str) -> str:
    """On one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
