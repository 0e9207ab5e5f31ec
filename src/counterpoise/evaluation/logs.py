"""Logs of finished runs, read item by item: lm-eval's --log_samples; others by what they are. No model is needed."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from counterpoise.checkpoints.reading import parse_json, read_text, stream_json_lines
from counterpoise.evaluation import inspect_logs
from counterpoise.evaluation.logged import (
    CALIBRATION,
    PER,
    UP,
    Column,
    Group,
    Key,
    Log,
    Task,
    close,
    hashed,
    made_of,
    of_hex,
    of_item,
)
from counterpoise.evaluation.results import measurement
from counterpoise.statistics.bootstrap import score, weighted
from counterpoise.statistics.paired import choice_calibration

SAMPLES = re.compile(r"samples_(?P<task>.+?)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl(\.gz)?$")
FIELDS = (
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "doc_hash", "prompt_hash", "target_hash",
)  # fmt: skip
PART = "held-out"


def read_log(spec: str, point: str = "PRE") -> Log:
    """Read a finished run.

    Args:
        spec: a folder that lm-eval wrote (--output_path with --log_samples), its results_*.json or samples_*.jsonl, a
            pattern of those; an Inspect log (.eval or .json) or a folder of them; a results file of counterpoise,
            as FILE#NAME for another point than `point`.

    Raises:
        FileNotFoundError: nothing of that name.
        ValueError: none of these, damaged, or two runs of one task in different folders.
    """
    path = Path(spec)
    if not path.exists() and (found := sorted(map(Path, glob.glob(spec, recursive=True)))):
        return _of_files(spec, found, point)
    if not path.exists() and "#" in spec:
        file, _, point = spec.rpartition("#")
        return _of_files(spec, [Path(file)], point)
    if path.is_dir():
        found = sorted(f for end in ("samples_*.jsonl", "samples_*.jsonl.gz", "*.eval") for f in path.rglob(end))
        return _of_files(spec, found or sorted(path.rglob("*.json")), point)
    return _of_files(spec, [path], point)


def _of_files(spec: str, files: list[Path], point: str) -> Log:
    if lines := [f for f in files if f.name.endswith((".jsonl", ".jsonl.gz"))]:
        return _lm_eval(spec, lines)
    if evals := [f for f in files if f.suffix == ".eval"]:
        return inspect_logs.read(spec, evals)
    read = {f: content for f in files if isinstance(content := _parsed(f), dict)}
    if inspected := [f for f, content in read.items() if "eval" in content and "status" in content]:
        return inspect_logs.read(spec, inspected)
    for file, content in read.items():
        if isinstance(content.get("points"), list):
            return _own(spec, content, point)
        if "results" in content and ("versions" in content or "configs" in content):
            date = file.stem.rpartition("_")[2]
            if beside := sorted(file.parent.glob(f"samples_*_{glob.escape(date)}.jsonl*")):
                return _lm_eval(spec, beside)
            raise ValueError(
                f"{file}: expected samples_TASK_{date}.jsonl beside it, found none; run lm_eval with --log_samples"
            )
    raise ValueError(
        f"{spec}: expected lm-eval's folder, its results_*.json or samples_*.jsonl, an Inspect log (.eval, .json) or a "
        f"results file of counterpoise, found {', '.join(f.name for f in files[:3]) or 'none of them in the folder'}"
    )


def _parsed(path: Path) -> Any:
    return parse_json(read_text(path), str(path))


def _own(spec: str, content: Mapping[str, Any], name: str) -> Log:
    """A point of restore.json or of what `counterpoise.evaluation.results` wrote."""
    named = [p for p in content["points"] if name in (p.get("name"), f"{p.get('name')} ({p.get('part')})")]
    if not named:
        known = ", ".join(f"{p.get('name')} ({p.get('part')})" for p in content["points"]) or "no points"
        raise ValueError(f"{spec}: expected a point named {name!r}, found {known}; choose one as FILE#NAME")
    point = next((p for p in named if p.get("part") == PART), named[0])
    tasks: dict[str, Task] = {}
    groups: dict[str, Group] = {}
    for ability, metrics in (point.get("statistics") or {}).items():
        for metric in metrics:
            if (m := measurement(content, point, ability, metric)) is None:
                continue
            parts = [(f"{ability}: {task}", part) for task, part in m.apart()]
            for task, part in parts or [(ability, m)]:
                keys = [Key(of_hex(k), 0, 0) for k in part.keys]
                rows = [tuple(map(float, row)) for row in part.statistics]
                column = Column(keys, list(rows), part.aggregate, part.unit, chance=(part.chance or 0.0) / 100)
                column.groups = part.groups
                tasks.setdefault(task, Task(task)).columns[metric, ""] = column
            if parts:
                sizes, base = [n for _, n, _ in m.subtasks], parts[0][1].aggregate
                ways = {"size": [(n, n) for n in sizes], "macro": [(n, 1) for n in sizes]}
                fits = tuple(way for way, strata in ways.items() if weighted(base, strata) == m.aggregate)
                group = groups.setdefault(ability, Group(tuple(task for task, _ in parts), {}))
                group.weights[metric, ""] = fits
    if not tasks:
        raise ValueError(
            f"{spec}: expected the statistics of every item, found none for {name}; run it again with this version"
        )
    return Log(spec, "counterpoise", tasks, groups)


def _lm_eval(spec: str, files: Iterable[Path]) -> Log:
    log = Log(spec, "lm-eval", {}, named=False)
    chosen: dict[str, tuple[str, Path]] = {}
    for file in files:
        match = SAMPLES.search(file.name)
        task, date = (match["task"], match["date"]) if match else (file.name.partition(".json")[0], "")
        log.named |= bool(match)
        if (other := chosen.get(task)) and other[1].parent != file.parent:
            raise ValueError(
                f"{spec}: expected one run, found {task} in {other[1].parent} and in {file.parent}; name one of them"
            )
        if other:
            log.notes.append(f"{spec} holds {task} more than once; the newest one counts.")
        chosen[task] = max(other or (date, file), (date, file))
    headers: dict[tuple[Path, str], dict[str, Any]] = {}
    for task, (date, file) in chosen.items():
        place = (file.parent, date)
        if place not in headers:
            headers[place] = _header(*place)
            log.groups |= _groups(headers[place])
            log.prompting |= {k: headers[place].get(k) for k in ("chat_template_sha", "system_instruction_sha")}
        log.tasks[task] = _task(task, file, headers[place])
    if not all(headers.values()):
        log.notes.append(f"{spec} has samples without their results_*.json: the versions of its tasks are not known.")
    return log


def _header(folder: Path, date: str) -> dict[str, Any]:
    """The results file of one run; empty where only samples were kept."""
    for file in sorted(folder.glob(f"*_{glob.escape(date)}.json")) if date else ():
        if isinstance(found := _parsed(file), dict) and "results" in found:
            return found
    return {}


def _task(name: str, file: Path, header: Mapping[str, Any]) -> Task:
    def of(what: str) -> Any:
        return (header.get(what) or {}).get(name)

    task = Task(name, of("versions"), of("n-shot"))
    directions = of("higher_is_better") or {}
    keys: dict[str, list[Key]] = {}
    guessed = rows = 0.0
    for place, row in stream_json_lines(file):
        kept = keys.setdefault(kind := str(row.get("filter", "none")), [])
        at, several = len(kept), len(keys) > 1
        kept.append(_key(row, place))
        metrics = row.get("metrics") or [k for k in row if k not in FIELDS]  # logs of before 0.4.6 do not list them
        measured = {m: of_item(m, row.get(m)) for m in metrics}
        missing = "no sum over items that can be had from a log"
        task.left_out |= {m: missing for m, v in measured.items() if v is None and row.get(m) is not None}
        logs = [] if several else _logs(row, metrics)  # the same for every filter
        if not several:
            rows, guessed = rows + 1, guessed + (1 / len(logs) if len(logs) > 1 else 0.0)
        found = _likelihoods(row, metrics, logs)
        for metric, values in [*measured.items(), *found.items()]:
            if values is None:
                continue
            if (column := task.columns.get((metric, kind))) is None:
                up = directions.get(metric, True if metric in UP else None)
                aggregate, unit = made_of(metric, len(values))
                up = True if aggregate == "ratio" or unit == "nats" else up  # log-likelihoods
                column = task.columns[metric, kind] = Column(kept, aggregate=aggregate, unit=unit, up=up)
            if len(values) != _width(column):
                raise ValueError(f"{place}: expected {metric} as in the lines before, found {row.get(metric)!r:.60}")
            column.put(at, [-v for v in values] if column.up is False else values)
    if not task.columns:
        raise ValueError(f"{file}: expected lines of lm-eval's --log_samples with their metrics, found none")
    results = of("results") or {}
    for (metric, kind), column in list(task.columns.items()):
        column.reported, column.chance = results.get(f"{metric},{kind}"), guessed / rows
        if isinstance(column.reported, (int, float)) and not close(_number(metric, column), column.reported):
            del task.columns[metric, kind]
            task.left_out[metric] = "lm-eval's own number is neither a mean nor a ratio of sums over its items"
    return task


def _width(column: Column) -> int:
    return {"mean": 1, "ratio": 2, "bleu": 10, CALIBRATION: 3}[column.aggregate]


def _number(metric: str, column: Column) -> float:
    """lm-eval's own number, from the items."""
    values = [v for v in column.values if v is not None]
    if not values or column.aggregate == CALIBRATION:
        return math.nan
    found = score(values, column.aggregate)
    if metric in ("perplexity", *PER) and metric != "bits_per_byte":
        return math.exp(min(-found, 700.0))
    return -found if metric == "bits_per_byte" or column.up is False else found


def _key(row: Mapping[str, Any], place: str) -> Key:
    """Logs of before 0.4.4 hold no hashes: they are made of what they are made of today."""
    if "doc_hash" not in row and "doc" not in row:
        raise ValueError(
            f"{place}: expected a line of lm-eval's --log_samples, with doc_hash, found {', '.join(list(row)[:6])}"
        )
    made: dict[str, Callable[[], Any]] = {
        "doc_hash": lambda: row["doc"],
        "target_hash": lambda: str(row.get("target")),
        "prompt_hash": lambda: _first_argument(row.get("arguments")),
    }
    return Key(*(of_hex(row[k]) if isinstance(row.get(k), str) else hashed(make()) for k, make in made.items()))


def _first_argument(arguments: Any) -> str:
    first = next(iter(arguments.values()), {}) if isinstance(arguments, dict) else (arguments or [[""]])[0]
    return str(first.get("arg_0") if isinstance(first, dict) else first[0])


def _logs(row: Mapping[str, Any], metrics: Sequence[str]) -> list[float]:
    """The log-likelihoods of what a model was asked to score: of every choice, or of the one answer; else none."""
    answers = [r[0] if isinstance(r, list) and r else r for r in row.get("resps") or ()]
    if not all(isinstance(r, list) and len(r) == 2 for r in answers):
        return []
    try:
        logs = [float(r[0]) for r in answers]
    except (TypeError, ValueError):
        return []
    # the second half is without the question
    return logs[: len(logs) // 2] if "acc_mutual_info" in metrics else logs


def _likelihoods(row: Mapping[str, Any], metrics: Sequence[str], logs: list[float]) -> dict[str, tuple[float, ...]]:
    """Log-likelihood of the gold, and where there are several choices what calibration needs."""
    if len(logs) < 2:
        return {"logprob": (logs[0],)} if logs and "perplexity" not in metrics else {}
    best = logs.index(max(logs))
    gold = _gold(row, len(logs), best)
    if gold is None or not math.isfinite(logs[best]):
        return {}
    return {"logprob": (logs[gold],), CALIBRATION: choice_calibration(logs, gold)}


def _gold(row: Mapping[str, Any], choices: int, best: int) -> int | None:
    """The right choice: by number, by its text, or by what accuracy says of the likeliest one."""
    target = str(row.get("target")).strip()
    if target.isdecimal() and int(target) < choices:
        gold: int | None = int(target)
    else:
        texts = [str(a.get("arg_1")).strip() for a in (row.get("arguments") or {}).values() if isinstance(a, dict)]
        gold = texts.index(target) if texts.count(target) == 1 and texts.index(target) < choices else None
    right = row.get("acc")
    if right is None or (gold is not None and (gold == best) == bool(right)):
        return gold
    return best if right else 1 - best if choices == 2 else None


def _groups(header: Mapping[str, Any]) -> dict[str, Group]:
    """Every group with its tasks, and which weights give the number that lm-eval itself gives it."""
    below, results = header.get("group_subtasks") or {}, header.get("results") or {}
    counts = {t: n.get("effective") for t, n in (header.get("n-samples") or {}).items()}

    def leaves(name: str) -> list[str]:
        inside = below.get(name) or ()
        return list(dict.fromkeys(t for child in inside for t in leaves(child))) if inside else [name]

    groups = {}
    for name in below:
        tasks = leaves(name)
        weights = {}
        for key, value in (results.get(name) or {}).items():
            metric, comma, kind = key.partition(",")
            found = {t: v for t in tasks if isinstance(v := (results.get(t) or {}).get(key), (int, float))}
            if not comma or metric.endswith("_stderr") or not found or not isinstance(value, (int, float)):
                continue
            sizes = {"size": [counts.get(t) or 0 for t in found], "macro": [1] * len(found)}
            weights[metric, kind] = tuple(
                way
                for way, w in sizes.items()
                if sum(w) and close(sum(n * v for n, v in zip(w, found.values(), strict=True)) / sum(w), value)
            )
        if weights and tasks != [name]:
            groups[name] = Group(tuple(tasks), weights)
    return groups
