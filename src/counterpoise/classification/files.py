"""Files of labelled texts: folders and tar archives, csv, tsv and jsonl; what is wrong is said with its line."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from counterpoise.checkpoints.reading import decoded, json_lines, lines_of, table

LabelledText = tuple[str, str]
"""A text and its label."""


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


def read_rows(content: bytes, place: str) -> list[LabelledText]:
    """The rows of a csv, tsv or jsonl file, told apart by the end of `place`; columns text and label.

    A tsv has no quoting: a quote in it is a quote. Labels are strings; numbers and booleans become theirs.

    Examples:
        >>> read_rows(b'label,text\\n1,"good, very"\\n', "books.csv")
        [('good, very', '1')]
    """
    text = decoded(content, place)
    if not text.strip():
        raise ValueError(f"{place}: expected rows with text and label, found an empty file; fill it or leave it out")
    rows = list(_json_rows(text, place) if place.endswith(".jsonl") else table_rows(text, place))
    if not rows:
        raise ValueError(f"{place}: expected rows with text and label, found none; fill the file or leave it out")
    return rows


def tab_rows(text: str, place: str) -> list[LabelledText]:
    """The rows of LABEL<TAB>TEXT lines; blank lines are passed over."""
    rows = []
    for where, line in lines_of(text, place):
        label, tab, rest = line.partition("\t")
        if not tab or not label.strip():
            raise ValueError(f"{where}: expected LABEL<TAB>TEXT, found {line[:60]!r}")
        rows.append((rest.strip(), label.strip()))
    if not rows:
        raise ValueError(f"{place}: expected LABEL<TAB>TEXT lines, found none; fill the file or leave it out")
    return rows


def table_rows(text: str, place: str) -> Iterator[LabelledText]:
    """The rows of a csv or, as the end of `place` says, a tsv, whose first line names the columns text and label."""
    for where, row in table(text, place, "text", "label"):
        yield row["text"], _label(row["label"], where)


def _json_rows(text: str, place: str) -> Iterator[LabelledText]:
    for where, row in json_lines(place, text):
        if not isinstance(row.get("text"), str) or "label" not in row:
            raise ValueError(f'{where}: expected {{"text": "...", "label": ...}}, found {str(row)[:60]}')
        yield row["text"], _label(row["label"], where)


def _label(value: object, where: str) -> str:
    if not isinstance(value, str | int) or not (label := str(value).strip()):
        raise ValueError(f"{where}: expected a label, a word or a whole number, found {value!r}; label it or remove it")
    return label
