"""Rows that belong together: a group that is named, or the same passage, context or prompt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from counterpoise.records import digest

TEXTS = ("passage", "context", "article", "story", "document", "prompt", "query", "question")
"""Fields whose text rows may share; of `messages` the first one of the user."""
LONG = 100
"""Characters of a line that is taken for a passage, or a part of one, within a longer text."""
FEW = 10


def groups_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The key of each row's group, from the content that it shares; "" for a row that is alone.

    Rows are together when they name the same `group`, or share a text of `TEXTS` or a line of it of at least 100 characters
    (without regard to case and white space), directly or through others. A text that stands in more than half of the rows,
    and in more than ten, is a template, and joins nothing; a `group` always does.
    """
    labels = [list(dict.fromkeys(_labels(row))) for row in rows]
    counts = Counter(label for some in labels for label in some)
    most = max(FEW, len(rows) / 2)
    parent: dict[str, str] = {}

    def root(label: str) -> str:
        while (above := parent.setdefault(label, label)) != label:
            parent[label] = label = parent[above]
        return label

    shared = [[k for k in some if counts[k] > 1 and (counts[k] <= most or k[0] == "=")] for some in labels]
    for some in shared:
        first, *others = sorted({root(label) for label in some}) or [""]
        parent.update(dict.fromkeys(others, first))
    return [digest(root(some[0])) if some else "" for some in shared]


def _labels(row: Mapping[str, Any]) -> Iterator[str]:
    if row.get("group") is not None:
        yield f"={json.dumps(row['group'], sort_keys=True, default=str)}"
    turns = row["messages"] if isinstance(row.get("messages"), list) else []
    said = [m.get("content") for m in turns if isinstance(m, dict) and m.get("role") == "user"][:1]
    for text in (found for found in (*said, *map(row.get, TEXTS)) if isinstance(found, str)):
        lines = [" ".join(line.split()) for line in text.casefold().split("\n")]
        if whole := " ".join(filter(None, lines)):
            yield f" {whole}"
        yield from (f" {line}" for line in lines if len(line) >= LONG)
