"""The published files of the paper's two data sets: FDU-MTL's reviews, and 20 Newsgroups by date."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from counterpoise.checkpoints.reading import lines_of
from counterpoise.classification.data import Parts, Split, TaskData, tasks_of
from counterpoise.classification.files import LabelledText, members
from counterpoise.classification.parts import SPLITS, SplitName

PARTS: dict[str, SplitName] = {"train": "train", "test": "test"}
NEWSGROUPS: dict[str, tuple[str, ...]] = {
    "comp": ("comp.os.ms-windows.misc", "comp.sys.mac.hardware", "comp.graphics", "comp.windows.x"),
    "rec": ("rec.sport.baseball", "rec.sport.hockey", "rec.autos", "rec.motorcycles"),
    "sci": ("sci.crypt", "sci.electronics", "sci.med", "sci.space"),
    "talk": ("talk.politics.mideast", "talk.religion.misc", "talk.politics.misc", "talk.politics.guns"),
}
"""The sixteen groups that BanditMTL's topic experiment uses, by task."""
_TASK_OF = {group: task for task, groups in NEWSGROUPS.items() for group in groups}
_QUOTE = re.compile(r"(writes in|writes:|wrote:|says:|said:|^In article|^Quoted from|^\||^>)")


def read_tasks(
    source: str | Path,
    layout: str,
    *,
    tasks: Sequence[str] | None = None,
    need: Collection[SplitName] = SPLITS,
    drop_leaked: bool = False,
) -> list[TaskData]:
    """The tasks of a folder or a tar archive, as `counterpoise.classification.read_tasks` splits them.

    Args:
        layout: `fdu-mtl`: NAME.task.train and NAME.task.test, a line is LABEL<TAB>tokenised text; bytes that are not utf-8
            are replaced (the published files hold some).
            `newsgroups`: 20news-bydate-train/GROUP/ID and -test, latin-1, as the four tasks comp, rec, sci and talk of
            BanditMTL, without headers, quotes and footers.
        drop_leaked: leave out of training and validation every text that stands, letter for letter, in the test part of
            any of the tasks. Of FDU-MTL's published test reviews 483 of 5,600 stand in their own task's training part.
    """
    found = tasks_of({"fdu-mtl": _fdu_mtl, "newsgroups": _newsgroups}[layout](source), source, tasks=tasks, need=need)
    if not drop_leaked:
        return found
    tested = {text for task in found for text in task.test.texts}
    return [replace(t, train=_without(t.train, tested), validation=_without(t.validation, tested)) for t in found]


def _without(part: Split, texts: Collection[object]) -> Split:
    kept = [i for i, text in enumerate(part.texts) if text not in texts]
    return Split(tuple(part.texts[i] for i in kept), tuple(part.labels[i] for i in kept))


def _fdu_mtl(source: str | Path) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for name, content in members(source):
        task, _, part = PurePosixPath(name).name.partition(".task.")
        if part in PARTS:
            rows = tab_rows(content.decode("utf-8", errors="replace"), name)
            found.setdefault(task, {})[PARTS[part]] = rows
    return found


def _newsgroups(source: str | Path) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for name, content in members(source):
        folders = PurePosixPath(name).parts[-3:-1]
        if len(folders) == 2 and (group := folders[1]) in _TASK_OF:
            part: SplitName = "test" if folders[0].endswith("test") else "train"
            row = strip_message(content.decode("latin-1")), group
            found.setdefault(_TASK_OF[group], {}).setdefault(part, []).append(row)
    return found


def strip_message(message: str) -> str:
    """A message without header, quoted lines and footer, by the rules of scikit-learn's `fetch_20newsgroups`.

    The header ends at the first blank line; quoted lines begin with > or | or name who wrote; the footer is what
    follows the last line of blanks or dashes, if anything stands before it.

    Examples:
        >>> strip_message("From: me\\nSubject: x\\n\\nme@y writes:\\n> old\\nI disagree.\\n\\n-- \\nMe, of Y\\n")
        'I disagree.'
    """
    body = message.partition("\n\n")[2]
    lines = [line for line in body.split("\n") if not _QUOTE.search(line)]
    lines = "\n".join(lines).strip().split("\n")
    rules = [i for i, line in enumerate(lines) if not line.strip().strip("-")]
    return "\n".join(lines[: rules[-1]] if rules and rules[-1] > 0 else lines).strip()


def tab_rows(text: str, place: str) -> list[LabelledText]:
    """The rows of LABEL<TAB>TEXT lines; blank lines are passed over."""
    rows: list[LabelledText] = []
    for where, line in lines_of(text, place):
        label, tab, rest = line.partition("\t")
        if not tab or not label.strip():
            raise ValueError(f"{where}: expected LABEL<TAB>TEXT, found {line[:60]!r}")
        rows.append((rest.strip(), label.strip()))
    if not rows:
        raise ValueError(f"{place}: expected LABEL<TAB>TEXT lines, found none; fill the file or leave it out")
    return rows
