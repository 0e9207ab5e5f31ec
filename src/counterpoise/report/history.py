"""Reading the record of a multi-task run (training.json): curves by task, over epochs. Absent keys are empty."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from counterpoise.classification.targets import figure

Record = Mapping[str, Any]
MOST_POINTS = 120
"""Of a curve over rounds; neighbours are averaged."""


class Curve(NamedTuple):
    """Values over time; `epochs` holds the time in epochs."""

    epochs: list[float]
    values: list[float]


class TaskScore(NamedTuple):
    """What a task came to.

    Attributes:
        examples: that it was trained on; None when unknown.
        accuracy: on test data, or on validation data where the run was not tested; of a task that is no choice of one
            class the figure that it is judged by (`targets.figure`).
        validation: the same at the best epoch, if that is known.
        test: figures, loss and number of examples on test data; empty where the run was not tested.
    """

    task: str
    examples: int | None
    accuracy: float
    validation: float | None
    test: Mapping[str, Any]


def tasks(record: Record) -> list[str]:
    """The tasks, in the order of training."""
    epochs = record.get("epochs") or ()
    return [str(t) for t in (epochs[0]["validation_loss"] if epochs else record.get("test") or ())]


def accuracies(epoch: Record) -> dict[str, float]:
    """By task, what it is judged by on validation data; older records hold nothing else."""
    found = epoch.get("validation", {}).items()
    return epoch.get("validation_accuracy") or {task: figure(figures, "accuracy") for task, figures in found}


def judged_by(record: Record) -> str:
    """What the figures of all tasks are called together."""
    return "accuracy" if _kinds(record) == {"classes"} else "score"


def in_nats(record: Record) -> bool:
    """Whether losses are cross-entropies, all of them; that of a number has no unit."""
    return "number" not in _kinds(record)


def _kinds(record: Record) -> set[str]:
    return {*(record.get("kinds") or {"": "classes"}).values()}


def by_epoch(record: Record, what: str) -> dict[str, Curve]:
    """Per task, what each epoch came to: train_loss, validation_loss or validation_accuracy."""
    epochs = record.get("epochs") or ()
    rows = [(float(e["epoch"]), accuracies(e) if what == "validation_accuracy" else e[what]) for e in epochs]
    return {task: _curve((x, row.get(task)) for x, row in rows) for task in tasks(record)}


def over_epochs(record: Record, read: Callable[[Record], Any]) -> Curve:
    """A number of each epoch."""
    return _curve((float(e["epoch"]), read(e)) for e in record.get("epochs") or ())


def by_round(record: Record, what: str) -> Curve:
    """A number of the weighting's metrics over the rounds, averaged to at most `MOST_POINTS`."""
    length = _rounds_in_epoch(record)
    return _thinned(_curve([(r["round"] / length, r.get(what)) for r in record.get("rounds") or ()]))


def weight_shares(record: Record) -> dict[str, Curve]:
    """Each task's share of the weights over the rounds; empty for a method without weights of its own."""
    length = _rounds_in_epoch(record)
    names = tasks(record)
    rows: list[tuple[float, list[float]]] = []
    for found in record.get("rounds") or ():
        weights = [found.get(f"weight/{t}") for t in names]
        if all(isinstance(w, float | int) and math.isfinite(w) for w in weights) and sum(weights) > 0.0:
            rows.append((found["round"] / length, [w / sum(weights) for w in weights]))
    return {t: _thinned(_curve([(x, row[i]) for x, row in rows])) for i, t in enumerate(names)} if rows else {}


def _rounds_in_epoch(record: Record) -> float:
    """Rounds until the largest task was seen once, as training counts them."""
    sizes, batch = record.get("examples"), record.get("batch_size")
    if sizes and batch:
        return float(math.ceil(max(parts[0] for parts in sizes.values()) / batch))
    last = max((r["round"] for r in record.get("rounds") or ()), default=1.0)
    return float(last) / max(len(record.get("epochs") or ()), 1)


def variance(values: Collection[float]) -> float:
    """The mean squared distance from the mean."""
    mean = sum(values) / len(values)
    return sum((x - mean) ** 2 for x in values) / len(values)


def best(record: Record) -> Mapping[str, Any] | None:
    """The epoch whose weights the model holds."""
    epochs, number = record.get("epochs") or (), record.get("best_epoch")
    return next((e for e in epochs if e["epoch"] == number), None)


def final_scores(record: Record) -> list[TaskScore]:
    """The tasks' scores, least accurate first: on test data, or on validation data where a run was not tested."""
    tested, kept, sizes = record.get("test") or {}, best(record), record.get("examples") or {}
    valid = accuracies(kept) if kept else {}
    rows = []
    for task in [t for t in tasks(record) if t in tested] or valid:
        test = tested.get(task) or {}
        accuracy = figure({k.replace("_", "-"): x for k, x in test.items()}, "accuracy") if test else valid[task]
        rows.append(TaskScore(task, sizes.get(task, [None])[0], accuracy, valid.get(task), test))
    return sorted(rows, key=lambda row: row.accuracy)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` examples.

    >>> [round(x, 3) for x in wilson_interval(0.9, 100)]
    [0.826, 0.945]
    """
    z = 1.96
    middle, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


def _curve(points: Iterable[tuple[float, Any]]) -> Curve:
    some = [(x, float(y)) for x, y in points if isinstance(y, float | int) and math.isfinite(y)]
    return Curve([x for x, _ in some], [y for _, y in some])


def _thinned(curve: Curve) -> Curve:
    size = math.ceil(len(curve.values) / MOST_POINTS)
    if size < 2:
        return curve
    parts = [slice(i, i + size) for i in range(0, len(curve.values), size)]
    return Curve(*([sum(column[part]) / len(column[part]) for part in parts] for column in curve))
