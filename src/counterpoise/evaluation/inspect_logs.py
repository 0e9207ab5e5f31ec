"""Inspect's logs (.eval, .json), read by zipfile and json."""

from __future__ import annotations

import importlib
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from counterpoise.checkpoints.reading import decoded, parse_json, read_text
from counterpoise.evaluation.logged import UP, Column, Key, Log, Task, close, hashed

GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
"""Correct, partial, incorrect, no answer, as Inspect's value_to_float."""
ZSTANDARD = 93


def read(spec: str, files: Iterable[Path]) -> Log:
    """One log, or several of different tasks; of two logs of one task the newer one counts.

    Raises:
        ValueError: no Inspect log, a damaged one, one compressed in a way that this Python cannot read.
    """
    log = Log(spec, "inspect", {})
    opened = sorted(((str((h := header(f)).get("eval", {}).get("created")), f, h) for f in files), key=lambda o: o[:2])
    for _, file, head in opened:
        about = head.get("eval") or {}
        name = str(about.get("task"))
        if name in log.tasks:
            log.notes.append(f"{spec} holds {name} more than once; the newest one counts.")
        if head.get("status") != "success":
            log.notes.append(f"{file.name}: its run ended with status {head.get('status')!r}; what was scored counts.")
        shots = {k: v for k, v in (about.get("task_args") or {}).items() if "shot" in k}
        log.tasks[name] = _task(Task(name, about.get("task_version"), shots or None), file, head)
    return log


def header(file: Path) -> dict[str, Any]:
    """What a log says of its run; a .json log holds its samples too."""
    if file.suffix == ".eval":
        found = next(_members(file, lambda name: name == "header.json"), None)
    else:
        found = parse_json(read_text(file), str(file))
    if not isinstance(found, dict) or "eval" not in found:
        raise ValueError(f"{file}: expected a finished Inspect log, found no header; did its run end?")
    return found


def _members(file: Path, wanted: Callable[[str], bool]) -> Iterator[Any]:
    """The json files inside an .eval, one at a time."""
    try:
        with zipfile.ZipFile(file) as opened:
            for member in opened.infolist():
                if wanted(member.filename):
                    if member.compress_type == ZSTANDARD and sys.version_info < (3, 14):
                        importlib.import_module("zipfile_zstd")  # it comes with Inspect
                    place = f"{file}, {member.filename}"
                    yield parse_json(decoded(opened.read(member), place), place)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{file}: expected an Inspect log, found it damaged ({error}); fetch it again") from None
    except ModuleNotFoundError:
        raise ValueError(
            f"{file}: expected a log that this Python can read, found it compressed by zstandard; pip install "
            "zipfile-zstd, or `inspect log convert --to json`"
        ) from None


def _task(task: Task, file: Path, head: Mapping[str, Any]) -> Task:
    scored: dict[str, dict[Any, list[float]]] = {}
    keys: dict[Any, Key] = {}
    guessed: dict[Any, float] = {}
    graded: dict[str, bool] = {}  # in letters or words: C, I, P, N, yes, no
    inside = _members(file, lambda name: name.startswith("samples/") and name.endswith(".json"))
    for sample in head.get("samples") or () if file.suffix != ".eval" else inside:
        who = sample.get("id")
        keys.setdefault(who, _key(sample))
        guessed[who] = 1 / len(choices) if (choices := sample.get("choices")) else 0.0
        for scorer, found in (sample.get("scores") or {}).items():
            value = found.get("value") if isinstance(found, dict) else found
            parts = {f"{scorer}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {scorer: value}
            for metric, part in parts.items():
                if (number := _number(part)) is None:
                    task.left_out[metric] = "its values are no numbers"
                else:
                    scored.setdefault(metric, {}).setdefault(who, []).append(number)
                    graded[metric] = graded.get(metric, True) and isinstance(part, str)
    reported = {s["name"]: s for s in ((head.get("results") or {}).get("scores") or ())}
    order = list(keys.values())
    for metric, values in scored.items():
        column = Column(order, chance=sum(guessed.values()) / len(guessed))
        for at, who in enumerate(keys):
            if who in values:
                column.put(at, [float(np.mean(values[who]))])  # over epochs
        found = (reported.get(metric.partition("/")[0]) or {}).get("metrics") or {}
        column.up = True if graded[metric] or "accuracy" in found or metric.partition("/")[0] in UP else None
        own = found.get("accuracy") or found.get("mean") or {}
        column.reported = own.get("value") if "/" not in metric else None
        mean = float(np.mean([v[0] for v in column.values if v is not None]))
        if column.reported is not None and not close(mean, column.reported):
            task.left_out[metric] = "Inspect's own number is no mean over its samples and epochs"
            continue
        if "accuracy" in found:
            column.unit, column.values = "%", [None if v is None else (100 * v[0],) for v in column.values]
        task.columns[metric, ""] = column
    if not task.columns:
        raise ValueError(f"{file}: expected samples with scores, found none that are numbers")
    return task


def _key(sample: Mapping[str, Any]) -> Key:
    messages = sample.get("messages") or ()
    asked = next((i for i, m in enumerate(messages) if m.get("role") == "assistant"), len(messages))
    document = [_said(sample.get("input")), sample.get("choices")]
    return Key(hashed(document), hashed([sample.get("target")]), hashed(_said(list(messages[:asked]))))


def _said(content: Any) -> Any:
    """A text, or who said what: the messages' own names differ from run to run."""
    return [[m.get("role"), m.get("content")] for m in content] if isinstance(content, list) else content


def _number(value: Any) -> float | None:
    if isinstance(value, (bool, int, float)):
        return float(value)
    if isinstance(value, str):
        if value in GRADES:
            return GRADES[value]
        try:
            return float(value)
        except ValueError:
            return {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}.get(value.lower())
    return None
