"""Tasks of labelled texts, read from a folder of files."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from counterpoise.classification import doubts
from counterpoise.classification.files import Columns, LabelledText, members, read_rows
from counterpoise.classification.parts import SPLITS, SplitName, place, refuse_parts_as_tasks
from counterpoise.classification.targets import Kind, Label, Target, Weights
from counterpoise.classification.vectors import Text
from counterpoise.multitask.losses import task_names

Layout = Literal["folder", "glue"]

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
TEST_SHARE = 0.2
VALIDATION_SHARE = 0.125  # of what remains: 70, 10 and 20 %, as FDU-MTL's authors split it

_ENDINGS = (".csv", ".tsv", ".jsonl")
_COLA = b"source\tlabel\tstar\tsentence\n"
"""The names of the columns of GLUE's CoLA, which alone has none."""
_EXPECTED: dict[Layout, str] = {
    "folder": "files NAME.csv, NAME.tsv or NAME.jsonl, or NAME.train.csv and NAME.test.csv",
    "glue": "folders NAME of train.tsv and dev.tsv",
}
_OTHER = (
    ".gz", ".bz2", ".xz", ".zst", ".zip", ".txt", ".tab", ".json", ".ndjson", ".jsonlines", ".parquet", ".arrow", ".feather",
    ".xls", ".xlsx",
)  # fmt: skip
"""Of data that is not read."""
_NO_DATA = ("readme", "license", "licence", "notice", "citation")

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
    texts: Sequence[str] = (),
    label: Sequence[str] = (),
    kinds: Mapping[str, Kind] = {},
) -> list[TaskData]:
    """The tasks of a folder or a tar archive.

    A part without a file of its own is taken out of the training file by a hash of the text: a test part of 20 %, and
    a validation part of 12.5 % of what remains. Tasks that lack the same files put the same text into the same part,
    whatever else they hold and however often they are read. Files are not compared: a text of a training file that also
    stands in a test file is in both parts.

    Args:
        source: a folder, a tar archive, or a folder that holds one archive.
        layout: `folder`: NAME.csv, NAME.tsv or NAME.jsonl with columns text and label, or NAME.train.csv,
            NAME.validation.csv, NAME.test.csv, or a folder NAME of train.csv and so on (`source` itself may be that
            folder), or folders train, validation and test of NAME.csv; any number of classes, any sizes.
            `glue`: NAME/train.tsv and NAME/dev.tsv as published; dev (of MNLI the matched) is the test part, since the
            published test files have no labels and are passed over.
        tasks: which, in this order; all by default, by name.
        need: the parts that must hold something; an evaluation needs only "test".
        texts, label: of `folder`: the columns, where they have names of their own; see `Columns`. Files that lack them
            are read by the usual names.
        kinds: of `folder`: by task what its labels are, where their looks say otherwise: a "number" though all are whole,
            "classes" though some have decimals, as versions do, "labels" separated by commas.

    Raises:
        FileNotFoundError: nothing at `source`.
        ValueError: no tasks, an unknown one, a bad line, an empty part, a single class, a label that training lacks, a
            label that is true of every row, files whose names say that they are parts of one task, in no way known here.

    Warns:
        UserWarning: what reads well but looks as if something else was meant, see `doubts`.

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
    if (texts or label) and layout == "glue":
        raise ValueError(f"layout glue: expected no columns, its files have their own; found {[*texts, *label]}")
    if kinds and layout == "glue":
        raise ValueError(f"layout glue: its files say what is a number; found {dict(kinds)}")
    names = () if tasks is None else task_names(tasks)
    found = _glue(source) if layout == "glue" else _folder(source, tuple(texts), tuple(label), kinds, names)
    if len(label) > 1 and "train" in need:
        _warn_of_absent(label, found)
    if not found:
        raise ValueError(f"{source}: expected {_EXPECTED[layout]}, found none; is the layout right?")
    made = tasks_of(found, source, tasks=tasks, need=need)
    _refuse_unknown("kinds of labels", kinds, found)
    return made


def _refuse_unknown(what: str, names: Collection[str], found: Collection[str]) -> None:
    if unknown := sorted({*names} - {*found}):
        raise ValueError(
            f"{what}: expected tasks among {sorted(found)}, found {unknown}; name those that are to be read"
        )


def tasks_of(
    found: Mapping[str, Parts],
    source: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    need: Collection[SplitName] = SPLITS,
) -> list[TaskData]:
    """The tasks of rows that were read at `source`, with the parts that they lack; see `read_tasks`."""
    chosen = sorted(found) if tasks is None else task_names(tasks)
    _refuse_unknown(str(source), chosen, found)
    return [_task(name, _split(found[name]), need) for name in chosen]


def weighted(tasks: Sequence[TaskData], weights: Weights) -> list[TaskData]:
    """The tasks with class weights, "balanced" or numbers by task and label; see `Target.weights`."""
    if weights != "balanced" and (strange := sorted(weights.keys() - {t.name for t in tasks})):
        raise ValueError(f"class weights: expected tasks among {[t.name for t in tasks]}, found {strange}")
    return [replace(t, weights=t.target().weights(t.name, weights, t.train.labels)) for t in tasks]


def whole(task: TaskData) -> TaskData:
    """The task with the rows of all its parts as the test part."""
    parts = [task.split(p) for p in SPLITS]
    every = Split(tuple(x for part in parts for x in part.texts), tuple(y for part in parts for y in part.labels))
    return replace(task, test=every)


def _folder(
    source: str | Path,
    texts: tuple[str, ...],
    label: tuple[str, ...],
    kinds: Mapping[str, Kind],
    names: Sequence[str],
) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    bare, passed = list[str](), list[str]()
    seen: set[str] = set()
    parted: dict[str, list[str]] = {}
    for name, content in members(source):
        path = PurePosixPath(name)
        if path.suffix.lower() not in _ENDINGS:
            passed += [name] if name.lower().endswith(_OTHER) and not path.name.lower().startswith(_NO_DATA) else []
            continue
        task, said = place(path, Path(source), names)
        part, parts = said or "train", found.setdefault(task, {})
        parted.setdefault(task, []).extend([path.stem] if said else [])
        if names and task not in names:
            continue
        bare += [] if said or names else [task]
        if part in parts:
            raise ValueError(f"{source}: expected one {part} file for the task {task!r}, found another, {name}")
        parts[part] = read_rows(content, name, Columns(texts, label, kinds.get(task), seen))
    if lacking := [x for x in (*texts, *label) if x not in seen]:
        raise ValueError(
            f"{source}: expected the columns {', '.join(lacking)} in some file, found them in none together; name the "
            "columns that this data has"
        )
    if passed:
        warnings.warn(f"{source}: only csv, tsv and jsonl files are read; left out: {', '.join(passed)}", stacklevel=3)
    refuse_parts_as_tasks(source, bare, parted)
    return found


def _warn_of_absent(labels: Sequence[str], found: Mapping[str, Parts]) -> None:
    """Say which columns of labels a task cannot learn, as no row of training has a 1 there."""
    for task, parts in found.items():
        held = {x for _, y in parts.get("train", ()) if isinstance(y, tuple) for x in y}
        if held and held <= {*labels} and (absent := [x for x in labels if x not in held]):
            warnings.warn(
                f"task {task!r}: no row of training has the label {', '.join(absent)}; it is left out", stacklevel=4
            )


def _glue(source: str | Path) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for name, content in members(source):
        task, part = PurePosixPath(name).parent.name, PurePosixPath(name).stem
        if name.endswith(".tsv") and part in ("train", "dev", "dev_matched"):
            named = _whole(_COLA + content if task == "CoLA" else content, name)
            found.setdefault(task, {})["train" if part == "train" else "test"] = read_rows(named, name)
    return found


def _whole(content: bytes, name: str) -> bytes:
    """Without the rows that end early, as some of QQP's do as it was published; a warning says how many."""
    lines = content.split(b"\n")
    kept = [x for x in lines if not x.strip() or x.count(b"\t") >= lines[0].count(b"\t")]
    if short := len(lines) - len(kept):
        warnings.warn(f"{name}: {short} rows have fewer columns than the first line and were left out.", stacklevel=2)
    return b"\n".join(kept)


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
    parts = _whole_numbers(parts) if kind == "classes" else parts
    named = {p: Counter(x for y in parts[p].labels for x in (y if isinstance(y, tuple) else (str(y),))) for p in SPLITS}
    labels = _in_order(named["train"] if "train" in need else sum(named.values(), Counter()))
    if "train" in need and len(labels) < (least := 2 if kind == "classes" else 1):
        expected = "at least two classes in training" if least == 2 else "a label in training"
        raise ValueError(f"task {name!r}: expected {expected}, found only {list(labels)}")
    if (
        kind == "labels"
        and "train" in need
        and all(len({*y}) == len(labels) for y in parts["train"].labels if isinstance(y, tuple))
    ):
        raise ValueError(
            f"task {name!r}: expected labels that hold in some rows of training, found that all of {list(labels)} hold in "
            "every one; a list names the labels that hold, it has no zeros and ones"
        )
    doubts.of_labels(name, sum(named.values(), Counter()))
    for part in SPLITS:
        if strange := sorted(named[part].keys() - set(labels)):
            raise ValueError(
                f"task {name!r}: expected in {part} the labels of training, {list(labels)}, found {strange}; correct the "
                f"labels, or give training an example of each (rows without a file {name}.{part} are parted by their texts)"
            )
    return TaskData(name, labels, parts["train"], parts["validation"], parts["test"], kind)


def _whole_numbers(parts: Mapping[SplitName, Split]) -> dict[SplitName, Split]:
    """Classes that are all whole numbers without their .0, which pandas writes where some label is missing."""
    every = {str(y) for part in parts.values() for y in part.labels}
    if not all(re.fullmatch(r"-?\d+(\.0*)?", y) for y in every):
        return dict(parts)
    return {p: Split(s.texts, tuple(str(y).partition(".")[0] for y in s.labels)) for p, s in parts.items()}


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
