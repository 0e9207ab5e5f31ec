"""Which task and which part of it, for training, validation or test, a file holds by its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

_WORDS: Mapping[str, SplitName] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing", "heldout", "held-out", "held_out"), "test"),
}
_LIKE_A_PART = re.compile(rf"(?:(.+)[._-])?({'|'.join(_WORDS)})(?:[._-]?(\d[\w.-]*)|[._-](.+))?", re.I)
"""As books_train, test-books, train1, train-00000-of-00001, validation_matched."""


def place(path: PurePosixPath, source: Path, names: Sequence[str]) -> tuple[str, SplitName | None]:
    """The task that a file of `source` holds, and the part, where its name or its folder's says one.

    A part without a task's name is of the only task in `names`, or of one that is called like its folder. A name in
    `names` is a task, whatever it looks like.

    Examples:
        >>> for name in ("books.train.csv", "books/dev.csv", "test/books.csv", "books.csv"):
        ...     print(*place(PurePosixPath(name), Path("reviews"), []))
        books train
        books validation
        books test
        books None
    """
    stem, folder = path.stem, path.parent.name
    task, _, tail = stem.rpartition(".")
    if task and tail.lower() in _WORDS:
        return task, _WORDS[tail.lower()]
    if stem.lower() in _WORDS and stem not in names:
        if len(names) == 1:
            called = names[0]
        else:
            whole = source.expanduser().resolve()
            called = re.sub(r"\.(tar(\.\w+)?|tgz)$", "", whole.name) if whole.is_file() else whole.name
        return folder or called.lstrip(".") or "task", _WORDS[stem.lower()]
    return stem, _WORDS.get(folder.lower())


def refuse_parts_as_tasks(source: str | Path, bare: Collection[str], found: Mapping[str, Collection[str]]) -> None:
    """Raise where files that say no part would be tasks that nobody asked for, and look like parts.

    Args:
        bare: the tasks of such files. A task may well be called speed_test.
        found: every task, with the names, without endings, of those of its files that do say a part.
    """
    meant = {name: match for name in sorted(bare) if (match := _LIKE_A_PART.fullmatch(name))}
    of = {name: (match[1] or match[4] or "").lower() for name, match in meant.items()}
    parted = {stem.lower() for stems in found.values() for stem in stems}
    kinds = {_WORDS[match[2].lower()] for match in meant.values()}
    for name, task in of.items():
        others = {x.lower() for x in found if x != name} | {x for other, x in of.items() if other != name}
        lone_words = parted & _WORDS.keys() or ("train" in kinds and len(kinds) > 1)
        if lone_words or (task in others if task else len(meant) > 1 or parted):
            raise ValueError(
                f"{source}: expected the parts of a task as NAME.train, NAME.validation and NAME.test, found {name!r}, which "
                "would be a task of its own; rename the file, join what is one part, or name the tasks"
            )
