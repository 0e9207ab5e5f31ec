"""What reads well in files of labelled texts and looks as if something else was meant: each is a warning."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from counterpoise.classification.vectors import Text

_NO_LABEL = ("-", "?", "nan", "NaN", "NA", "N/A", "n/a", "<NA>", "null", "None")
_SEPARATORS = ",;|"
_SEVERAL = "where several may hold, name the task as multi-label, and write lists or commas"
FEW = 5
"""Fewer rows of validation are said."""


def of_columns(where: str, unread: Sequence[str], read: Sequence[str]) -> None:
    """Columns that often hold texts, or tasks, and are not read."""
    if unread:
        task = "; a file is one task, write one for each" if "task" in unread else ""
        _say(
            f"{where}: {' and '.join(read)} is the text, {', '.join(unread)} is not read; name the columns of the text "
            f"if that is wrong{task}"
        )


def of_quotes(place: str, texts: Sequence[Text], labels: Sequence[Sequence[Any]]) -> None:
    """A tsv whose cells are quoted, and a csv with a quote too many, which makes one text of many rows."""
    rows = [(*((x,) if isinstance(x, str) else x), *map(str, y)) for x, y in zip(texts, labels, strict=True)]
    if place.lower().endswith(".tsv"):
        if quoted := sum(any(map(_quoted, row)) for row in rows):
            _say(
                f"{place}: {quoted} rows have cells in quotes, with the quotes in them doubled; a tsv is read without "
                "quoting, and they stay: write it as a csv, or without"
            )
        return
    known = {y for row in labels for y in map(str, row)}
    for row in rows:
        inner = [line for x in row for line in x.splitlines()[1:] if "," in line]
        if sum(bool({line.split(",", 1)[0], line.rsplit(",", 1)[1]} & known) for line in inner) > 1:
            _say(
                f"{place}: a text has lines that look like rows of their own, {inner[0][:60]!r}; is there a quote too many?"
            )
            return


def of_labels(task: str, count: Mapping[str, int]) -> None:
    """Labels that mean none, that look alike, or that join others."""
    others = [n for x, n in count.items() if x != "-1" and x.isdecimal()]
    few = len(others) > 1 and len(others) == len(count) - 1 and count.get("-1", 0) < 0.1 * sum(others) / len(others)
    for label in (x for x in count if x in _NO_LABEL or (few and x == "-1")):  # -1, 0, 1 are classes as well
        _say(
            f"task {task!r}: {count[label]} rows have the label {label!r}, which often says that there is none; it is learned "
            "as one more, unless you remove them"
        )
    alike = defaultdict[str, list[str]](list)
    for label in count:
        seen = "".join(x for x in unicodedata.normalize("NFKC", label).casefold() if unicodedata.category(x) != "Cf")
        alike[seen.lstrip("0") or "0" if seen.isdecimal() else {"true": "1", "false": "0"}.get(seen, seen)].append(
            label
        )
    for labels in (sorted(x) for x in alike.values() if len(x) > 1):
        _say(f"task {task!r}: the labels {labels} look alike and are learned as several; spell them in one way")
    if count and all(re.fullmatch(r"\[.*[\s,].*\]", x) for x in count):
        _say(
            f"task {task!r}: labels such as {next(iter(count))!r} look like lists, and each is learned as one; {_SEVERAL}"
        )
        return
    for separator in _SEPARATORS:
        parts = {x: [part.strip() for part in x.split(separator)] for x in count}
        often = Counter(part for found in parts.values() for part in {*found})
        joined = [x for x, found in parts.items() if len(found) > 1 and all(often[part] > 1 for part in found)]
        if joined:
            _say(f"task {task!r}: the label {joined[0]!r} looks like several, and is learned as one; {_SEVERAL}")


def of_parts(task: str, texts: Mapping[str, Sequence[Text]]) -> None:
    """Texts of a test, or of a validation, that training has seen; and a validation that says little."""
    seen = {*texts["train"]}
    for part in ("validation", "test"):
        if shared := sum(x in seen for x in texts[part]):
            _say(
                f"task {task!r}: {shared} of {len(texts[part])} texts for {part} also stand in training, and tell of recall"
            )
    if (rows := len(texts["validation"])) < FEW:
        _say(f"task {task!r}: the best epoch is picked by {rows} rows of validation; give it more")


def _quoted(cell: str) -> bool:
    """Whether a csv writer put it in quotes, and doubled those in it."""
    inside = cell[1:-1]
    return cell[:1] == cell[-1:] == '"' and '""' in inside and '"' not in inside.replace('""', "")


def _say(what: str) -> None:
    warnings.warn(what, stacklevel=3)
