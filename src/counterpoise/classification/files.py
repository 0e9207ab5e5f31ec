"""Files of labelled texts: folders and tar archives, csv, tsv and jsonl; what is wrong is said with its line."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from counterpoise.checkpoints.reading import decoded, json_lines, table
from counterpoise.classification import doubts
from counterpoise.classification.targets import Kind, Label
from counterpoise.classification.vectors import Text

LabelledText = tuple[Text, Label]
"""A text, or two, and its label."""
Cells = tuple[str, list[Any]]
"""Where a row is, and what the columns of its label hold."""

TEXTS = (
    ("text",), ("text1", "text2"), ("text_a", "text_b"), ("sentence1", "sentence2"), ("question1", "question2"),
    ("#1 String", "#2 String"), ("premise", "hypothesis"), ("question", "sentence"), ("question", "passage"),
    ("sentence",),
)  # fmt: skip
"""Columns that hold a text, or two; the first of these that a file has."""
LABELS = (("label",), ("labels",), ("gold_label",), ("is_duplicate",), ("Quality",), ("score",))


@dataclass(frozen=True)
class Columns:
    """Which columns of a file count, where they are not of the names that GLUE and its like give them.

    Attributes:
        texts: one name, or two of a pair; a file without them: see `TEXTS`.
        labels: one name, or several, each of a label that holds where its column says 1; a file without: see `LABELS`.
        kind: what the labels are, whatever they look like: "number", "classes", or "labels", any number of them in a cell,
            in a list or separated by commas; None: by their looks.
        seen: the names that some file had.
    """

    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    kind: Kind | None = None
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if len(self.texts) > 2:
            raise ValueError(f"text columns: expected one, or two of a pair, found {len(self.texts)}")

    def among(self, found: Sequence[str], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The columns of texts and labels among those of a file."""
        known = (self.texts or TEXTS[0], *TEXTS), (self.labels or LABELS[0], *LABELS)
        texts, labels = (next((x for x in names if {*x} <= {*found}), names[0]) for names in known)
        if not self.seen & {*texts}:  # once for files of the same columns
            known_texts = {name for names in TEXTS for name in names} | {"task", "title", "context"}
            doubts.of_columns(where, [x for x in found if x in known_texts - {*texts, *labels}], texts)
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
            for name in sorted(_below(path)):
                if not _hidden(name):
                    yield name, (path / name).read_bytes()
            return
        path = inside[0]
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a folder or a tar archive of task files, found nothing there")
    if not tarfile.is_tarfile(path):
        raise ValueError(f"{path}: expected a folder or a tar archive, found another file; give the folder it is in")
    with tarfile.open(path) as archive:
        held = (m for m in archive if m.isfile() or m.islnk() or m.issym())
        for member in sorted(held, key=lambda m: m.name):
            name = member.name.removeprefix("./")
            try:
                content = None if _hidden(name) else archive.extractfile(member)
            except KeyError:
                raise ValueError(
                    f"{path}: expected {member.linkname!r}, to which {name!r} is a link, found no such member"
                ) from None
            if content:
                yield name, content.read()


def _below(folder: Path) -> Iterator[str]:
    """The files of a folder and of those below it, also where they are linked to, but not round in circles."""
    for here, folders, names in os.walk(folder, followlinks=True):
        at = Path(here)
        folders[:] = [x for x in folders if not at.resolve().is_relative_to((at / x).resolve())]
        yield from (
            (at / x).relative_to(folder).as_posix() for x in names if (at / x).is_file() or (at / x).is_symlink()
        )


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def read_rows(content: bytes, place: str, columns: Columns = Columns()) -> list[LabelledText]:
    """The rows of a csv, tsv or jsonl file, told apart by the end of `place`.

    A tsv has no quoting: a quote in it is a quote. The first row says which columns count, and every row has them. Labels
    are words: booleans and whole numbers become theirs. They are numbers where the column is `score`, or one of them has
    decimals (in jsonl: is a number, not the spelling of one). They are several a row where each cell is a list, as Python
    or JSON writes it; in a column `labels` or by `columns.kind` also words separated by commas.

    Warns:
        UserWarning: what reads well but looks as if something else was meant, see `doubts`.

    Examples:
        >>> read_rows(b'label,text\\n1,"good, very"\\n', "books.csv")
        [('good, very', '1')]
        >>> read_rows(b'{"premise": "It rains.", "hypothesis": "It is wet.", "score": 4}', "rain.jsonl")
        [(('It rains.', 'It is wet.'), 4.0)]
    """
    text, lines = decoded(content, place), place.lower().endswith(".jsonl")
    texts: list[Text] = []
    cells: list[Cells] = []
    names: tuple[tuple[str, ...], tuple[str, ...]] = (), ()
    for where, record in json_lines(place, text) if lines else table(text, place):
        if not texts:
            names = columns.among([*record], where if lines else f"{place}, line 1")
        _refuse_lacking((*names[0], *names[1]), [*record], where, "give this row what the first one has, or remove it")
        texts.append(_text(record, names[0], where))
        cells.append((where, [record[name] for name in names[1]]))
    if not texts:
        raise ValueError(f"{place}: expected rows with text and label, found none; fill the file or leave it out")
    if not lines:
        doubts.of_quotes(place, texts, [values for _, values in cells])
    return list(zip(texts, _labels(cells, names[1], columns.kind, lines), strict=True))


def _refuse_lacking(names: Sequence[str], found: Sequence[str], where: str, advice: str) -> None:
    if lacking := [x for x in names if x not in found]:
        raise ValueError(
            f"{where}: expected the columns {', '.join(names)}, found {', '.join(found)} (no {', '.join(lacking)}); {advice}"
        )


def _text(record: Mapping[str, Any], names: tuple[str, ...], where: str) -> Text:
    found = [record[name] for name in names]
    for x in found:
        if not isinstance(x, str) or re.search("[\ud800-\udfff]", x):  # half of a pair, which json can write
            raise ValueError(f"{where}: expected text in {' and '.join(names)}, found {x!r}")
    return found[0] if len(found) == 1 else (found[0], found[1])


def _labels(cells: Sequence[Cells], names: tuple[str, ...], kind: Kind | None, lines: bool) -> Sequence[Label]:
    """What the cells of the label's columns say."""
    if len(names) > 1:
        return [_held(values, names, where) for where, values in cells]
    single = [(where, values[0]) for where, values in cells]
    commas = kind == "labels" or (kind is None and names == ("labels",))
    may = kind in (None, "labels")
    lists = [_listed(x, where, commas) if may else None for where, x in single]
    if kind == "labels" or any(x is not None for x in lists):
        if kind is None and not commas and None in lists:
            where, x = single[lists.index(None)]
            raise ValueError(
                f"{where}: expected a list of labels, as other rows have, found {x!r}; write a list in every row or in none"
            )
        _refuse_zeros_and_ones(single, lists)
        held = [x if x is not None else _one(y, where) for x, (where, y) in zip(lists, single, strict=True)]
        return [x if isinstance(x, tuple) or kind is None else (str(x),) for x in held]
    found = [_one(x, where) for where, x in single]
    decimals = any(_has_decimals(y) for y in found if isinstance(y, float) or not lines)
    if kind == "number" or (kind is None and (names == ("score",) or decimals)):
        return [_number(y, where) for y, (where, _) in zip(found, single, strict=True)]
    if kind is None:
        _refuse_no_number(found, single)
    return [str(y) for y in found]


def _held(values: Sequence[Any], names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The names of the columns that say 1."""
    said = {name: str(x).strip().lower().removesuffix(".0") for name, x in zip(names, values, strict=True)}
    for name, x in said.items():
        if x not in ("0", "1", "false", "true"):
            raise ValueError(f"{where}: expected 0 or 1 in {name}, one of several labels, found {x!r}")
    return tuple(name for name, x in said.items() if x in ("1", "true"))


def _listed(value: Any, where: str, commas: bool) -> tuple[str, ...] | None:
    """The labels that a cell lists, each once; None: it is no list."""
    if isinstance(value, str):
        read = _literal(value.strip())
        if not commas and not all(isinstance(x, str) for x in read or ()):
            return None  # [0, 9] may be a bin
        if read is None and commas:
            if value.strip().startswith(("[", '"[')):  # the latter as pandas writes a list into a tsv
                raise ValueError(f"{where}: expected labels in a list, or separated by commas, found {value[:60]!r}")
            if ";" in value or "|" in value:
                raise ValueError(
                    f"{where}: expected labels separated by commas, found {value!r}; write commas, or a list in each cell"
                )
            read = [x for x in value.split(",") if x.strip()]
        value = read
    if not isinstance(value, list) or not all(isinstance(x, str | int) and str(x).strip() for x in value):
        return None
    return tuple(_word(str(x), where) for x in value)


def _literal(cell: str) -> list[Any] | None:
    """A list as JSON or Python writes it; None: it is no such list."""
    if not cell.startswith("[") or re.search(r"['\"]\s+['\"]", cell):  # as numpy's: Python would join the words
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(cell)
        except (ValueError, SyntaxError):
            continue
        return value if isinstance(value, list) else None
    return None


def _refuse_zeros_and_ones(cells: Sequence[tuple[str, Any]], lists: list[tuple[str, ...] | None]) -> None:
    """Lists of as many zeros and ones as there are labels do not name labels; else each name of a list counts once."""
    given = [x for x in lists if x]
    alike = len({len(x) for x in given}) == 1 and len(given[0]) > 1
    for n, ((where, value), held) in enumerate(zip(cells, lists, strict=True)):
        if held and {x.lower() for x in held} <= {"0", "1", "true", "false"} and (alike or len({*held}) < len(held)):
            raise ValueError(
                f"{where}: expected the names of the labels that hold, each once, found {value}; zeros and ones stand in "
                "columns of their own, which are named as the columns of the label"
            )
        lists[n] = held and tuple(dict.fromkeys(held))


def _one(value: Any, where: str) -> str | float:
    """A label alone: a word, or a number with decimals."""
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


def _value(label: str | float) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None


def _has_decimals(label: str | float) -> bool:
    number = _value(label)
    return number is not None and math.isfinite(number) and number != int(number)


def _number(label: str | float, where: str) -> float:
    number = _value(label)
    if number is None or not math.isfinite(number):
        raise ValueError(f"{where}: expected a number, as this task's other labels are, found {label!r}")
    return number


def _refuse_no_number(labels: Sequence[str | float], cells: Sequence[tuple[str, Any]]) -> None:
    """Raise for a nan among whole numbers, which pandas writes for a label that is missing."""
    values = [_value(y) for y in labels]
    if None not in values and any(math.isfinite(x) for x in values if x is not None):
        for (where, _), x in zip(cells, values, strict=True):
            if x is not None and math.isnan(x):
                raise ValueError(
                    f"{where}: expected a label, as this file's other numbers are, found nan; label it or remove it"
                )
