"""Files of labelled texts: folders and tar archives, csv, tsv and jsonl; what is wrong is said with its line."""

from __future__ import annotations

import ast
import json
import math
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from counterpoise.checkpoints.reading import decoded, json_lines, table
from counterpoise.classification.targets import Label
from counterpoise.classification.vectors import Text

LabelledText = tuple[Text, Label]
"""A text, or two, and its label."""

TEXTS = (
    ("text",), ("text1", "text2"), ("text_a", "text_b"), ("sentence1", "sentence2"), ("question1", "question2"),
    ("#1 String", "#2 String"), ("premise", "hypothesis"), ("question", "sentence"), ("question", "passage"),
    ("sentence",),
)  # fmt: skip
"""Columns that hold a text, or two; the first of these that a file has."""
LABELS = (("label",), ("labels",), ("gold_label",), ("is_duplicate",), ("Quality",), ("score",))

_PART = re.compile(r"(.+)[._-](train(?:ing)?|test(?:ing)?|valid(?:ation)?|val|dev|eval(?:uation)?|held-?out)", re.I)
"""How a file is named that was meant to be a part of a task, with the name of that task."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a file count, where they are not of the names that GLUE and its like give them.

    Attributes:
        texts: one name, or two of a pair; a file without them: see `TEXTS`.
        labels: one name, or several, each of a label that holds where its column says 1; a file without: see `LABELS`.
        numbers: labels are numbers (regression), also where all of them are whole; or they are none, whatever they look
            like; None: by their looks.
        seen: the names that some file had.
    """

    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    numbers: bool | None = None
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if len(self.texts) > 2:
            raise ValueError(f"text columns: expected one, or two of a pair, found {len(self.texts)}")

    def among(self, found: Sequence[str], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The columns of texts and labels among those of a file."""
        known = (self.texts or TEXTS[0], *TEXTS), (self.labels or LABELS[0], *LABELS)
        texts, labels = (next((x for x in names if {*x} <= {*found}), names[0]) for names in known)
        self.seen.update(texts, labels)
        _refuse_lacking((*texts, *labels), found, where, "name the columns, or leave out a file without labels")
        return texts, labels


def members(source: str | Path) -> Iterator[tuple[str, bytes]]:
    """(path inside, content) of every file of a folder or a tar archive (`.tar`, `.tar.gz`, `.tgz`), in name order.

    A folder that holds nothing but one archive (and perhaps a readme) stands for that archive. Hidden files, and what
    is in hidden folders, are left out.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a file that is no archive.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if not p.name.startswith((".", "README")))
        if len(inside) != 1 or not inside[0].is_file() or not tarfile.is_tarfile(inside[0]):
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                if not _hidden(name := file.relative_to(path).as_posix()):
                    yield name, file.read_bytes()
            return
        path = inside[0]
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a folder or a tar archive of task files, found nothing there")
    if not tarfile.is_tarfile(path):
        raise ValueError(f"{path}: expected a folder or a tar archive, found another file; give the folder it is in")
    with tarfile.open(path) as archive:
        for member in sorted((m for m in archive if m.isfile()), key=lambda m: m.name):
            name = member.name.removeprefix("./")
            if not _hidden(name) and (content := archive.extractfile(member)):
                yield name, content.read()


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def refuse_parts_as_tasks(source: str | Path, bare: Collection[str], found: Collection[str]) -> None:
    """Raise where two files of no part would be tasks that nobody asked for, and are by their names parts of one."""
    meant = {name: match[1] for name in bare if (match := _PART.fullmatch(name))}
    for name, task in meant.items():
        if task in found or [*meant.values()].count(task) > 1:
            raise ValueError(
                f"{source}: expected the parts of a task as NAME.train, NAME.validation and NAME.test, found {name!r}, which "
                f"would be a task of its own beside {task!r}; rename the file, or name the tasks"
            )


def read_rows(content: bytes, place: str, columns: Columns = Columns()) -> list[LabelledText]:
    """The rows of a csv, tsv or jsonl file, told apart by the end of `place`.

    A tsv has no quoting: a quote in it is a quote. The first row says which columns count, and every row has them. Labels
    are words: booleans and whole numbers become theirs. They are numbers where the column is `score`, or
    one of them has decimals (in jsonl: is a number, not the spelling of one). In a column `labels` any number may hold:
    names in a list, which is written as Python or JSON does, or in a table separated by commas.

    Examples:
        >>> read_rows(b'label,text\\n1,"good, very"\\n', "books.csv")
        [('good, very', '1')]
        >>> read_rows(b'{"premise": "It rains.", "hypothesis": "It is wet.", "score": 4}', "rain.jsonl")
        [(('It rains.', 'It is wet.'), 4.0)]
    """
    text, lines = decoded(content, place), place.lower().endswith(".jsonl")
    rows: list[tuple[str, Text, Label]] = []
    cells: list[tuple[str, Any]] = []
    names: tuple[tuple[str, ...], tuple[str, ...]] = (), ()
    for where, record in json_lines(place, text) if lines else table(text, place):
        if not rows:
            names = columns.among([*record], where if lines else f"{place}, line 1")
        _refuse_lacking((*names[0], *names[1]), [*record], where, "give this row what the first one has, or remove it")
        rows.append((where, _text(record, names[0], where), _label(record, names[1], where)))
        cells.append((where, record[names[1][0]]))
    if not rows:
        raise ValueError(f"{place}: expected rows with text and label, found none; fill the file or leave it out")
    if not lines and names[1] == ("labels",):
        _refuse_other_separators(cells)
    elif not lines and len(names[1]) == 1 and all(lists := [_listed(str(cell), (str,)) for _, cell in cells]):
        return [(x, tuple(dict.fromkeys(y or ()))) for (_, x, _), y in zip(rows, lists, strict=True)]
    decimals = any(_has_decimals(y) for _, _, y in rows if isinstance(y, float) or not lines)
    if columns.numbers or (columns.numbers is None and (names[1] == ("score",) or decimals)):
        return [(x, _number(y, where)) for where, x, y in rows]
    if columns.numbers is None:
        _refuse_no_number(rows)
    return [(x, y if isinstance(y, tuple) else str(y)) for _, x, y in rows]


def _refuse_lacking(names: Sequence[str], found: Sequence[str], where: str, advice: str) -> None:
    if lacking := [x for x in names if x not in found]:
        raise ValueError(
            f"{where}: expected the columns {', '.join(names)}, found {', '.join(found)} (no {', '.join(lacking)}); {advice}"
        )


def _refuse_other_separators(cells: Sequence[tuple[str, Any]]) -> None:
    """Cells without a comma or a list, of which some hold a semicolon or a bar: those were meant to part labels."""
    if not any("," in str(cell) or str(cell).strip().startswith("[") for _, cell in cells):
        for where, cell in cells:
            if ";" in str(cell) or "|" in str(cell):
                raise ValueError(
                    f"{where}: expected labels separated by commas, found {cell!r}; write commas, or a list in each cell"
                )


def _refuse_no_number(rows: Sequence[tuple[str, Text, Label]]) -> None:
    """Raise for a nan among whole numbers, which pandas writes for a label that is missing."""
    values = [_value(y) for _, _, y in rows]
    if None not in values and any(math.isfinite(x) for x in values if x is not None):
        for (where, _, _), x in zip(rows, values, strict=True):
            if x is not None and math.isnan(x):
                raise ValueError(
                    f"{where}: expected a label, as this file's other numbers are, found nan; label it or remove it"
                )


def _listed(cell: str, kinds: tuple[type, ...]) -> list[str] | None:
    """The labels of a list of such values, as JSON or Python writes it; None: it is no such list."""
    if not cell.strip().startswith("[") or re.search(r"['\"]\s+['\"]", cell):  # as numpy's: Python would join the words
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(cell.strip())
        except (ValueError, SyntaxError):
            continue
        return [str(x) for x in value] if isinstance(value, list) and all(isinstance(x, kinds) for x in value) else None
    return None


def _value(label: Label) -> float | None:
    try:
        return None if isinstance(label, tuple) else float(label)
    except ValueError:
        return None


def _text(record: Mapping[str, Any], names: tuple[str, ...], where: str) -> Text:
    found = [record[name] for name in names]
    if strange := [x for x in found if not isinstance(x, str)]:
        raise ValueError(f"{where}: expected text in {' and '.join(names)}, found {strange[0]!r}")
    return found[0] if len(found) == 1 else (found[0], found[1])


def _label(record: Mapping[str, Any], names: tuple[str, ...], where: str) -> Label:
    value = record[names[0]]
    if len(names) > 1:
        for name in names:
            if str(record[name]).strip().lower() not in ("0", "1", "false", "true"):
                raise ValueError(f"{where}: expected 0 or 1 in {name}, one of several labels, found {record[name]!r}")
        return tuple(name for name in names if str(record[name]).strip().lower() in ("1", "true"))
    if names == ("labels",) and isinstance(value, str):
        held_in_list = _listed(value, (str, int))
        if held_in_list is None and value.strip().startswith("["):
            raise ValueError(f"{where}: expected labels in a list, or separated by commas, found {value[:60]!r}")
        value = [x.strip() for x in value.split(",") if x.strip()] if held_in_list is None else held_in_list
    if isinstance(value, list) and all(isinstance(x, str | int) and str(x).strip() for x in value):
        held = tuple(_word(str(x), where) for x in value)
        if len({*held}) < len(held) and {*held} <= {"0", "1"}:
            raise ValueError(
                f"{where}: expected the names of the labels that hold, each once, found {value}; zeros and ones stand in "
                "columns of their own, which are named as the columns of the label"
            )
        return tuple(dict.fromkeys(held))
    if isinstance(value, float) and math.isfinite(value):
        return value
    if not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{where}: expected a label, a word or a number, found {value!r}; label it or remove it")
    return _word(str(value), where)


def _word(label: str, where: str) -> str:
    """A label without the blanks around it; answers are lines of cells, and a label is one cell of them."""
    if any(x in label.strip() for x in "\t\n\r"):
        raise ValueError(f"{where}: expected a label on one line and without tabs, found {label!r}; rename it")
    return label.strip()


def _has_decimals(label: Label) -> bool:
    number = _value(label)
    return number is not None and math.isfinite(number) and number != int(number)


def _number(label: Label, where: str) -> float:
    number = _value(label)
    if number is None or not math.isfinite(number):
        raise ValueError(f"{where}: expected a number, as this task's other labels are, found {label!r}")
    return number
