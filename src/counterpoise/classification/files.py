"""Files of labelled texts: folders and tar archives, csv, tsv and jsonl; what is wrong is said with its line."""

from __future__ import annotations

import math
import tarfile
from collections.abc import Iterator, Mapping, Sequence
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


@dataclass(frozen=True)
class Columns:
    """Which columns of a file count, where they are not of the names that GLUE and its like give them.

    Attributes:
        texts: one name, or two of a pair; a file without them: see `TEXTS`.
        labels: one name, or several, each of a label that holds where its column says 1; a file without: see `LABELS`.
        numbers: labels are numbers (regression), also where all of them are whole.
        seen: the names that some file had.
    """

    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    numbers: bool = False
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if len(self.texts) > 2:
            raise ValueError(f"text columns: expected one, or two of a pair, found {len(self.texts)}")

    def among(self, found: Sequence[str], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The columns of texts and labels among those of a file."""
        known = (self.texts or TEXTS[0], *TEXTS), (self.labels or LABELS[0], *LABELS)
        texts, labels = (next((x for x in names if {*x} <= {*found}), names[0]) for names in known)
        self.seen.update(texts, labels)
        if lacking := [x for x in (*texts, *labels) if x not in found]:
            raise ValueError(
                f"{where}: expected the columns {', '.join((*texts, *labels))}, found {', '.join(found)} "
                f"(no {', '.join(lacking)}); name the columns, or leave out a file without labels"
            )
        return texts, labels


def members(source: str | Path) -> Iterator[tuple[str, bytes]]:
    """(path inside, content) of every file of a folder or a tar archive (`.tar`, `.tar.gz`, `.tgz`), in name order.

    A folder that holds nothing but one archive (and perhaps a readme) stands for that archive.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a file that is no archive.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if not p.name.startswith((".", "README")))
        if len(inside) != 1 or not inside[0].is_file() or not tarfile.is_tarfile(inside[0]):
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                yield file.relative_to(path).as_posix(), file.read_bytes()
            return
        path = inside[0]
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a folder or a tar archive of task files, found nothing there")
    if not tarfile.is_tarfile(path):
        raise ValueError(f"{path}: expected a folder or a tar archive, found another file; give the folder it is in")
    with tarfile.open(path) as archive:
        for member in sorted((m for m in archive if m.isfile()), key=lambda m: m.name):
            if content := archive.extractfile(member):
                yield member.name.removeprefix("./"), content.read()


def read_rows(content: bytes, place: str, columns: Columns = Columns()) -> list[LabelledText]:
    """The rows of a csv, tsv or jsonl file, told apart by the end of `place`.

    A tsv has no quoting: a quote in it is a quote. Labels are words: whole numbers and booleans become theirs. They are
    numbers where the column is `score`, or one of them has decimals (in jsonl: is a number, not the spelling of one).
    In a column `labels` any number may hold: lists in jsonl, separated by commas in a table.

    Examples:
        >>> read_rows(b'label,text\\n1,"good, very"\\n', "books.csv")
        [('good, very', '1')]
        >>> read_rows(b'{"premise": "It rains.", "hypothesis": "It is wet.", "score": 4}', "rain.jsonl")
        [(('It rains.', 'It is wet.'), 4.0)]
    """
    text, lines = decoded(content, place), place.endswith(".jsonl")
    rows: list[tuple[str, Text, Label]] = []
    names: tuple[tuple[str, ...], tuple[str, ...]] = (), ()
    for where, record in json_lines(place, text) if lines else table(text, place):
        if not rows or not {*names[0], *names[1]} <= record.keys():
            names = columns.among([*record], where if lines else f"{place}, line 1")
        rows.append((where, _text(record, names[0], where), _label(record, names[1], where)))
    if not rows:
        raise ValueError(f"{place}: expected rows with text and label, found none; fill the file or leave it out")
    decimals = any(_has_decimals(y) for _, _, y in rows if isinstance(y, float) or not lines)
    numbers = columns.numbers or names[1] == ("score",) or decimals
    return [(x, _number(y, where) if numbers else y if isinstance(y, tuple) else str(y)) for where, x, y in rows]


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
        value = [x.strip() for x in value.split(",") if x.strip()]
    if isinstance(value, list) and all(isinstance(x, str | int) and str(x).strip() for x in value):
        return tuple(dict.fromkeys(str(x).strip() for x in value))
    if isinstance(value, float) and math.isfinite(value):
        return value
    if not isinstance(value, str | int) or not (label := str(value).strip()):
        raise ValueError(f"{where}: expected a label, a word or a number, found {value!r}; label it or remove it")
    return label


def _has_decimals(label: Label) -> bool:
    if isinstance(label, tuple):
        return False
    try:
        number = float(label)
    except ValueError:
        return False
    return math.isfinite(number) and number != int(number)


def _number(label: Label, where: str) -> float:
    try:
        number = float(label) if not isinstance(label, tuple) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: expected a number, as this task's other labels are, found {label!r}")
    return number
