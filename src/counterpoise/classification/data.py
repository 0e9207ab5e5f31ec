"""Tasks of labelled texts, read from a folder of files, the FDU-MTL layout or 20 Newsgroups by date."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from counterpoise.classification.files import Columns, LabelledText, members, read_rows, tab_rows
from counterpoise.classification.targets import Kind, Label, Target, Weights
from counterpoise.classification.vectors import Text
from counterpoise.multitask.losses import task_names

SplitName = Literal["train", "validation", "test"]
Layout = Literal["folder", "glue", "fdu-mtl", "newsgroups"]

SPLITS: tuple[SplitName, ...] = get_args(SplitName)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
TEST_SHARE = 0.2
VALIDATION_SHARE = 0.125  # of what remains: 70, 10 and 20 %, as FDU-MTL's authors split it

_ENDINGS = (".csv", ".tsv", ".jsonl")
_COLA = b"source\tlabel\tstar\tsentence\n"
"""The names of the columns of GLUE's CoLA, which alone has none."""
_ALIASES: dict[str, SplitName] = {p: p for p in SPLITS} | dict.fromkeys(("valid", "val", "dev"), "validation")

NEWSGROUPS: dict[str, tuple[str, ...]] = {
    "comp": ("comp.os.ms-windows.misc", "comp.sys.mac.hardware", "comp.graphics", "comp.windows.x"),
    "rec": ("rec.sport.baseball", "rec.sport.hockey", "rec.autos", "rec.motorcycles"),
    "sci": ("sci.crypt", "sci.electronics", "sci.med", "sci.space"),
    "talk": ("talk.politics.mideast", "talk.religion.misc", "talk.politics.misc", "talk.politics.guns"),
}
"""The sixteen groups that BanditMTL's topic experiment uses, by task."""

_TASK_OF = {group: task for task, groups in NEWSGROUPS.items() for group in groups}
_QUOTE = re.compile(r"(writes in|writes:|wrote:|says:|said:|^In article|^Quoted from|^\||^>)")

Parts = dict[SplitName, list[LabelledText]]
"""A task's rows by part, as the files give them."""


@dataclass(frozen=True)
class Split:
    """Texts, or pairs of them, and their labels, in the same order."""

    texts: tuple[Text, ...]
    labels: tuple[Label, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TaskData:
    """One task: its labels, in the order of the head's outputs, its three parts, and what is asked."""

    name: str
    labels: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    kind: Kind = "classes"
    weights: tuple[float, ...] = ()
    """How much a label counts in training; empty: one as much as another."""

    def target(self) -> Target:
        """What its head answers."""
        return Target(self.labels, self.kind, isinstance(next(iter(self.train.texts), None), tuple))

    def split(self, name: SplitName) -> Split:
        """The examples of `train`, `validation` or `test`."""
        return getattr(self, name)  # type: ignore[no-any-return]


def read_tasks(
    source: str | Path,
    layout: Layout = "folder",
    *,
    tasks: Sequence[str] | None = None,
    need: Collection[SplitName] = SPLITS,
    drop_leaked: bool = False,
    texts: Sequence[str] = (),
    label: Sequence[str] = (),
    regression: Collection[str] = (),
) -> list[TaskData]:
    """The tasks of a folder or a tar archive.

    A part without a file of its own is taken out of the training file by a hash of the text: a test part of 20 %, and
    a validation part of 12.5 % of what remains. Tasks that lack the same files put the same text into the same part,
    whatever else they hold and however often they are read. Files are not compared: a text of a training file that also
    stands in a test file is in both parts, unless `drop_leaked`.

    Args:
        source: a folder, a tar archive, or a folder that holds one archive.
        layout: `folder`: NAME.csv, NAME.tsv or NAME.jsonl with columns text and label, or NAME.train.csv,
            NAME.validation.csv, NAME.test.csv, or a folder NAME of train.csv and so on; any number of classes, any sizes.
            `glue`: NAME/train.tsv and NAME/dev.tsv as published; dev (of MNLI the matched) is the test part, since the
            published test files have no labels and are passed over.
            `fdu-mtl`: NAME.task.train and NAME.task.test, a line is LABEL<TAB>tokenised text; bytes that are not utf-8
            are replaced (the published files hold some).
            `newsgroups`: 20news-bydate-train/GROUP/ID and -test, latin-1, as the four tasks comp, rec, sci and talk of
            BanditMTL, without headers, quotes and footers.
        tasks: which, in this order; all by default, by name.
        need: the parts that must hold something; an evaluation needs only "test".
        drop_leaked: leave out of training and validation every text that stands, letter for letter, in the test part of
            any task at `source`. Of FDU-MTL's published test reviews 483 of 5,600 stand in their own task's training part.
        texts, label: of `folder`: the columns, where they have names of their own; see `Columns`. Files that lack them
            are read by the usual names.
        regression: tasks whose labels are numbers though all of them are whole.

    Raises:
        FileNotFoundError: nothing at `source`.
        ValueError: no tasks, an unknown one, a bad line, an empty part, a single class, a label that training lacks.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     rows = "".join(f"text {i},{'good' if i % 3 else 'bad'}\\n" for i in range(100))
        ...     _ = Path(folder, "films.csv").write_text("text,label\\n" + rows)
        ...     [films] = read_tasks(folder)
        >>> films.labels, len(films.train) + len(films.validation) + len(films.test)
        (('bad', 'good'), 100)
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected {', '.join(LAYOUTS)}, found {layout!r}")
    reader, expected = _READERS[layout]
    if (texts or label) and layout != "folder":
        raise ValueError(f"layout {layout}: expected no columns, its files have their own; found {[*texts, *label]}")
    found = reader(source) if layout != "folder" else _folder(source, tuple(texts), tuple(label), regression)
    if unknown := sorted({*regression} - found.keys()):
        raise ValueError(f"regression: expected tasks among {sorted(found)}, found {unknown}")
    if not found:
        raise ValueError(f"{source}: expected {expected}, found none; is the layout right?")
    chosen = sorted(found) if tasks is None else task_names(tasks)
    if unknown := [t for t in chosen if t not in found]:
        raise ValueError(f"{source}: expected tasks among {sorted(found)}, found {unknown}")
    split = {name: _split(files) for name, files in found.items()}
    if drop_leaked:
        tested = {text for rows in split.values() for text, _ in rows["test"]}
        for rows in split.values():
            for part in ("train", "validation"):
                rows[part] = [row for row in rows[part] if row[0] not in tested]
    return [_task(name, split[name], need) for name in chosen]


def weighted(tasks: Sequence[TaskData], weights: Weights) -> list[TaskData]:
    """The tasks with class weights, "balanced" or numbers by task and label; see `Target.weights`."""
    if weights != "balanced" and (strange := sorted(weights.keys() - {t.name for t in tasks})):
        raise ValueError(f"class weights: expected tasks among {[t.name for t in tasks]}, found {strange}")
    return [replace(t, weights=t.target().weights(t.name, weights, t.train.labels)) for t in tasks]


def _folder(
    source: str | Path, texts: tuple[str, ...] = (), label: tuple[str, ...] = (), regression: Collection[str] = ()
) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    seen: set[str] = set()
    for name, content in members(source):
        path = PurePosixPath(name)
        if path.suffix not in _ENDINGS:
            continue
        task, dot, tail = path.stem.rpartition(".")
        if not dot and path.stem in _ALIASES and path.parent.name:
            task, dot, tail = path.parent.name, ".", path.stem
        part = _ALIASES.get(tail) if dot else None
        task, part = (task, part) if part else (path.stem, "train")
        parts = found.setdefault(task, {})
        if part in parts:
            raise ValueError(f"{source}: expected one {part} file for the task {task!r}, found another, {name}")
        parts[part] = read_rows(content, name, Columns(texts, label, task in regression, seen))
    if lacking := [x for x in (*texts, *label) if x not in seen]:
        raise ValueError(
            f"{source}: expected the columns {', '.join(lacking)} in some file, found them in none together"
        )
    return found


def _glue(source: str | Path) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for name, content in members(source):
        task, part = PurePosixPath(name).parent.name, PurePosixPath(name).stem
        if name.endswith(".tsv") and part in ("train", "dev", "dev_matched"):
            named = _COLA + content if task == "CoLA" else content
            found.setdefault(task, {})["train" if part == "train" else "test"] = read_rows(named, name)
    return found


def _fdu_mtl(source: str | Path) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for name, content in members(source):
        task, _, part = PurePosixPath(name).name.partition(".task.")
        if part in _ALIASES:
            rows = tab_rows(content.decode("utf-8", errors="replace"), name)
            found.setdefault(task, {})[_ALIASES[part]] = rows
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


_READERS: dict[Layout, tuple[Callable[[str | Path], dict[str, Parts]], str]] = {
    "glue": (_glue, "folders NAME of train.tsv and dev.tsv"),
    "folder": (_folder, "files NAME.csv, NAME.tsv or NAME.jsonl, or NAME.train.csv and NAME.test.csv"),
    "fdu-mtl": (_fdu_mtl, "files NAME.task.train and NAME.task.test"),
    "newsgroups": (_newsgroups, "folders 20news-bydate-train/GROUP and 20news-bydate-test/GROUP"),
}


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


def _split(files: Parts) -> Parts:
    rows: Parts = {part: list(files.get(part, ())) for part in SPLITS} | {"train": []}
    drawn = [p for p in SPLITS if p not in files]
    for row in files.get("train", ()):
        rows[content_split(row[0], drawn)].append(row)
    return rows


def _task(name: str, rows: Parts, need: Collection[SplitName]) -> TaskData:
    found = {type(y) for p in SPLITS for _, y in rows[p]}
    kind: Kind = "number" if float in found else "labels" if tuple in found else "classes"
    if kind == "labels" and len(found) > 1:
        raise ValueError(
            f"task {name!r}: expected lists of labels in every row, found also one alone; write it in a list"
        )
    if len({isinstance(x, tuple) for p in SPLITS for x, _ in rows[p]}) > 1:
        raise ValueError(f"task {name!r}: expected pairs of texts in all its files or in none, found both")
    parts = {p: Split(tuple(x for x, _ in rows[p]), tuple(y for _, y in rows[p])) for p in SPLITS}
    for part in need:
        if not len(parts[part]):
            raise ValueError(
                f"task {name!r}: expected examples for {part}, found none "
                f"({', '.join(f'{p} {len(parts[p])}' for p in SPLITS)}); add rows, or a file {name}.{part} of its own"
            )
    if kind == "number":  # as a part of whole numbers alone also may be meant
        return TaskData(name, ("score",), parts["train"], parts["validation"], parts["test"], kind)
    named = {p: {x for y in parts[p].labels for x in (y if isinstance(y, tuple) else (str(y),))} for p in SPLITS}
    labels = _in_order(named["train"] or {x for p in SPLITS for x in named[p]})
    if "train" in need and len(labels) < (least := 2 if kind == "classes" else 1):
        expected = "at least two classes in training" if least == 2 else "a label in training"
        raise ValueError(f"task {name!r}: expected {expected}, found only {list(labels)}")
    for part in SPLITS:
        if strange := sorted(named[part] - set(labels)):
            raise ValueError(
                f"task {name!r}: expected in {part} the labels of training, {list(labels)}, found {strange}; "
                f"correct the labels, or give training an example of each"
            )
    return TaskData(name, labels, parts["train"], parts["validation"], parts["test"], kind)


def content_split(text: Text, drawn: Collection[SplitName] = ("validation", "test")) -> SplitName:
    """The part that a text of the training file falls into, when those in `drawn` have no file of their own.

    Examples:
        >>> [content_split(x) for x in ("a fine book", "dull", "never again, it broke")]
        ['test', 'validation', 'train']
        >>> content_split("a fine book", ["validation"])
        'train'
    """
    digest = hashlib.sha256((text if isinstance(text, str) else "\t".join(text)).encode()).digest()
    if "test" in drawn and int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64:
        return "test"
    if "validation" in drawn and int.from_bytes(digest[8:16], "big") < VALIDATION_SHARE * 2**64:
        return "validation"
    return "train"


def _in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Whole numbers by value, anything else by spelling."""
    if all(x.removeprefix("-").isdecimal() for x in labels):
        return tuple(sorted(labels, key=lambda x: (int(x), x)))
    return tuple(sorted(labels))
