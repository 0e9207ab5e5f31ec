"""report.html of a multi-task run: accuracy by task, losses and weights over time, and how far the tasks are apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from counterpoise.report import history, multitask_plots as task_plots
from counterpoise.report.history import Record
from counterpoise.report.page import Figures, fact_list, glossary, header, page, plot_box, run_section, section
from counterpoise.tables.grid import Cell, Column, Table, as_html
from counterpoise.tables.numbers import number
from counterpoise.tables.reading import version_list

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_KINDS = {
    "train_loss": ("loss in training", "Training loss{1}"),
    "validation_loss": ("loss on validation data", "Validation loss{1}"),
    "validation_accuracy": ("{0} on validation data", "Validation {0}"),
}
_PERCENT = "\N{NO-BREAK SPACE}%"
_MORE = {"macro_f1": "macro-F1, %", "mcc": "MCC", "micro_f1": "micro-F1, %", "exact": "exact, %", "pearson": "Pearson",
         "spearman": "Spearman"}  # fmt: skip
"""Figures beside the one that a task is judged by, of test data."""
_GLOSSARY = {
    "Weights": "What each task's loss is multiplied with, as a share of their sum. A method without weights of its own "
    "(MGDA, Tchebycheff and others act on gradients or on the largest loss) has none to show.",
    "Task variance": "The mean squared distance of the task losses from their mean. BanditMTL descends on about the mean "
    "plus the square root of twice its radius times this variance.",
    "Effective tasks": "The exponential of the entropy of the weights: as many as there are tasks when all weigh the same, 1 "
    "when one has everything.",
    "Epoch": "Rounds until the largest task has been seen once; every round holds rows of every task, so smaller tasks come "
    "round more often. With a prior of the sizes they come in proportion to it.",
    "Macro-F1": "The mean over the labels of F1, the harmonic mean of precision and recall: a rare label counts as much as a "
    "frequent one. MCC is Matthews' correlation of answers and labels, 0 for who always answers the same.",
    "Kept": "The epoch with the best mean figure on validation data; the model holds its weights. Its validation scores are "
    "therefore a little too good; test data decided nothing.",
    "Intervals": "Wilson's, over the test examples, each task alone. They say nothing of another seed of the training.",
}


def multitask_page(record: Record) -> str:
    """The page of one run from the content of training.json; absent parts are left out."""
    figures: Figures = {}
    sections = [
        _accuracy_section(record, figures),
        _curves_section(record, figures),
        _weights_section(record, figures),
        _variance_section(record, figures),
        _run_section(record),
        glossary(_GLOSSARY),
    ]
    title = f"counterpoise: {len(history.tasks(record))} tasks, {record.get('weighting') or 'a multi-task run'}"
    return page(title, _header(record) + "".join(sections), figures)


def _header(record: Record) -> str:
    epochs, took = record.get("epochs") or (), None
    if epochs:
        seconds = epochs[-1]["seconds"]
        took = f"{number(seconds, 0)} seconds" if seconds < 100 else f"{number(seconds / 60, 1)} minutes"
    facts = {
        "Weighting": _weighting(record),
        "Model": record.get("model"),
        "Data": record.get("data"),
        "Kept": f"epoch {record.get('best_epoch')} of {len(epochs)} ({record.get('stopped')})" if epochs else None,
        "Took": took,
        "Written to": record.get("out"),
        "Date": record.get("date"),
    }
    return header("one model, many tasks", _verdict(record), fact_list(facts))


def _verdict(record: Record) -> str:
    """The mean and the worst task, in one sentence."""
    found = history.final_scores(record)
    if not found:
        return "No accuracy was recorded."
    part = "test" if record.get("test") else "validation"
    mean = f"Mean {part} {history.judged_by(record)} {number(100 * sum(s.accuracy for s in found) / len(found), 1)}{_PERCENT}"
    rare = [s.test["macro_f1"] for s in found if "macro_f1" in s.test and "accuracy" in s.test]
    beside = f" Mean macro-F1 {number(100 * sum(rare) / len(rare), 1)}{_PERCENT}." if len(rare) == len(found) else ""
    if len(found) == 1:
        return f"{mean}.{beside}"
    low, high = (f"{number(100 * s.accuracy, 1)}{_PERCENT} ({s.task})" for s in (found[0], found[-1]))
    return f"{mean}, from {low} to {high}.{beside}"


def _weighting(record: Record) -> str | None:
    name = record.get("weighting")
    if name is None:
        return None
    told = {"min_effective_tasks": "at least {:g} effective tasks", "rho": "rho {:.4g}", "eta": "eta {:g}"}
    settings = [text.format(record[key]) for key, text in told.items() if record.get(key) is not None]
    at_end = history.by_round(record, "effective_tasks").values
    if at_end:
        settings.append(f"{at_end[-1]:.1f} of {len(history.tasks(record))} effective at the end")
    return f"{name} ({', '.join(settings)})" if settings else str(name)


def _accuracy_section(record: Record, figures: Figures) -> str:
    found = history.final_scores(record)
    if not found:
        return ""
    caption = "The weakest task is at the top. Bars are 95 % intervals over the test examples."
    if (judged := history.judged_by(record)) == "score":
        caption = "The weakest task is at the top: of classes accuracy, of several labels their mean F1, of a number the mean "
        caption += "of both correlations. Bars, of accuracies alone, are 95 % intervals over the test examples."
    if len(found) > task_plots.MOST_ROWS:
        caption += f" The {task_plots.MOST_ROWS} weakest of {len(found)}; all are in the table."
    draw = partial(task_plots.plot_accuracies, record)
    box = plot_box(figures, "accuracies", f"{judged.capitalize()} by task", draw, caption, low=len(found) <= 10)
    return section(
        f"{judged.capitalize()}, task by task",
        box + as_html(_scores(found, nats=history.in_nats(record)), "Scores by task") + _by_label(found),
    )


def _by_label(found: Sequence[history.TaskScore]) -> str:
    """Precision, recall and F1 of every label, folded away."""
    rows = [(s.task, label, of) for s in found for label, of in s.test.get("classes", {}).items()]
    if not rows:
        return ""

    def share(name: str) -> Column:
        return Column(f"{name}, %", lambda r: Cell(number(100 * r[2][name.lower()], 1)))

    columns = (
        Column("task", lambda r: Cell(r[0]), False),
        Column("label", lambda r: Cell(r[1]), False),
        *map(share, ("Precision", "Recall", "F1")),
        Column("tested on", lambda r: Cell(number(r[2]["examples"], 0))),
    )
    table = as_html(Table(columns, tuple(rows)), "Scores by label")
    return f"<details><summary>Each label</summary>{table}</details>"


def _scores(rows: Sequence[history.TaskScore], *, nats: bool) -> Table:
    def percent(share: float | None) -> Cell:
        return Cell(number(None if share is None else 100 * share, 1))

    def one(name: str, title: str) -> Column:
        percent, digits = (100, 1) if title.endswith("%") else (1, 3)
        return Column(title, lambda r: Cell(number(None if (x := r.test.get(name)) is None else percent * x, digits)))

    columns = (
        Column("task", lambda r: Cell(r.task), False),
        Column("trained on", lambda r: Cell(number(r.examples, 0))),
        Column("validation, %", lambda r: percent(r.validation)),
        Column("test, %", lambda r: percent(r.accuracy if r.test else None)),
        *(one(name, title) for name, title in _MORE.items() if any(name in r.test for r in rows)),
        Column("test loss, nats" if nats else "test loss", lambda r: Cell(number(r.test.get("loss"), 3))),
        Column("tested on", lambda r: Cell(number(r.test.get("examples"), 0))),
    )
    return Table(columns, tuple(rows))


def _curves_section(record: Record, figures: Figures) -> str:
    if not record.get("epochs"):
        return ""
    judged = history.judged_by(record)
    menus = {"show": {kind: shown.format(judged) for kind, (shown, _) in _KINDS.items()}}
    caption = "Losses are mean cross-entropies. Those in training are with dropout, of the epoch's mini-batches."
    if not history.in_nats(record):
        caption += " That of a number is the mean square error, as a share of the training labels' variance."
    if len(history.tasks(record)) > task_plots.FEW:
        caption += " The tasks that end highest and lowest are picked out; the pointer names the others."

    def draw(kind: str) -> Figure:
        return task_plots.plot_curves(
            record,
            history.by_epoch(record, kind),
            _KINDS[kind][1].format(judged, " (nats)" if history.in_nats(record) else ""),
        )

    box = plot_box(figures, "curves", "Loss and accuracy by task over epochs", draw, caption, menus)
    return section("Over time", box)


def _weights_section(record: Record, figures: Figures) -> str:
    found = history.weight_shares(record)
    if not found or len(found) < 2:
        return ""
    caption = "Each task's share of the weights. Above an equal share, a task is pushed; below it, it is spared."
    draw = partial(task_plots.plot_weights, record, found)
    return section("Weights", plot_box(figures, "weights", "Weights over time", draw, caption, low=True))


def _variance_section(record: Record, figures: Figures) -> str:
    if not record.get("epochs") or len(history.tasks(record)) < 2:
        return ""
    caption = "How far apart the task losses are. Tasks with more classes have larger losses without being neglected."
    draw, label = partial(task_plots.plot_variance, record), "Variance of the task losses over time"
    return section("Task variance", plot_box(figures, "variance", label, draw, caption, low=True))


def _rows(record: Record) -> str | None:
    size, prior = record.get("batch_size"), record.get("prior", "uniform")
    return size if size is None or prior == "uniform" else f"{size} on the average, shared out by the {prior} prior"


def _class_weights(record: Record) -> str | None:
    """They change the loss that is trained, not the figures."""
    weights = record.get("class_weights")
    told = weights if isinstance(weights, str | None) else json.dumps(weights, ensure_ascii=False)
    return told and f"{told}; losses in training are with them"


def _run_section(record: Record) -> str:
    facts = {
        "Seed": record.get("seed"),
        "Examples of each task in a round": _rows(record),
        "Picked by": record.get("pick"),
        "Class weights": _class_weights(record),
        "Versions": version_list(record) or None,
    }
    told = ("lr", "normalize", "layout", "width", "max_tokens", "dropout", "vectors")
    settings = {k: json.dumps(record[k], ensure_ascii=False) for k in told if record.get(k) is not None}
    return run_section(record.get("command"), facts, {"Settings": fact_list(settings)})
