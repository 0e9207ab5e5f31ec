"""20 Newsgroups by date as four tasks of four classes, without the headers, quotes and footers that give it away."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Literal

from counterpoise.classification.files import LabelledText

TASKS: dict[str, tuple[str, ...]] = {
    "comp": ("comp.os.ms-windows.misc", "comp.sys.mac.hardware", "comp.graphics", "comp.windows.x"),
    "rec": ("rec.sport.baseball", "rec.sport.hockey", "rec.autos", "rec.motorcycles"),
    "sci": ("sci.crypt", "sci.electronics", "sci.med", "sci.space"),
    "talk": ("talk.politics.mideast", "talk.religion.misc", "talk.politics.misc", "talk.politics.guns"),
}
"""The sixteen groups that BanditMTL's topic experiment uses, by task."""

_QUOTE = re.compile(r"(writes in|writes:|wrote:|says:|said:|^In article|^Quoted from|^\||^>)")
_TASK_OF = {group: task for task, groups in TASKS.items() for group in groups}


def newsgroups(files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, Literal["train", "test"], LabelledText]]:
    """(task, part, (text, group)) of every message of the sixteen groups."""
    for name, content in files:
        folders = PurePosixPath(name).parts[-3:-1]
        if len(folders) != 2 or folders[1] not in _TASK_OF:
            continue
        part: Literal["train", "test"] = "test" if folders[0].endswith("test") else "train"
        yield _TASK_OF[folders[1]], part, (strip_message(content.decode("latin-1")), folders[1])


def strip_message(message: str) -> str:
    """A message without header, quoted lines and footer, by the rules of scikit-learn's `fetch_20newsgroups`.

    The header ends at the first blank line; quoted lines begin with > or | or name who wrote; the footer is what
    follows the last line of blanks or dashes, if anything stands before it.

    Example:
        >>> strip_message("From: me\\nSubject: x\\n\\nme@y writes:\\n> old\\nI disagree.\\n\\n-- \\nMe, of Y\\n")
        'I disagree.'
    """
    body = message.partition("\n\n")[2]
    lines = [line for line in body.split("\n") if not _QUOTE.search(line)]
    lines = "\n".join(lines).strip().split("\n")
    rules = [i for i, line in enumerate(lines) if not line.strip().strip("-")]
    return "\n".join(lines[: rules[-1]] if rules and rules[-1] > 0 else lines).strip()
