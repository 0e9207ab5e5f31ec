"""`counterpoise multitask`: train, evaluate and ask a multi-task text classifier. Heavy imports inside the commands."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from counterpoise.cli import lines, options, scores_table
from counterpoise.cli.help import Commands, option
from counterpoise.cli.terminal import bars, command_line, plain_errors, print_json, say, until_enough_is_read

if TYPE_CHECKING:
    from counterpoise.classification import TaskData

app = Commands("multitask", "Train one text classifier on many tasks, balance them, and ask it.")

Weightings = Literal[
    "uniform", "bandit", "uncertainty", "dwa", "gradnorm", "tchebycheff", "smooth-tchebycheff", "famo", "groupdro", "mgda",
    "pcgrad", "cagrad", "upgrad", "rlw", "excess", "imtl-l", "imtl-g", "fairgrad",
    "nash", "aligned", "db-mtl",
]  # fmt: skip
Data = Annotated[Path, option("PATH", "Folder or tar archive of task files.")]
LayoutOption = Annotated[
    Literal["folder", "glue"],
    option(None, "folder: NAME.csv, .tsv or .jsonl of text,label; glue: as published."),
]
TextColumns = Annotated[
    str | None, option("A,B", "Columns of the text, or of both texts of a pair (else the usual ones).")
]
LabelColumns = Annotated[str | None, option("A,B", "Column of the label; or several of 0 and 1, one for each label.")]
TasksOption = Annotated[str | None, option("A,B", "Names, separated by commas; all by default.")]
ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder that train wrote.")]
TextsAtOnce = Annotated[int, option("N", "Texts at once.", min=1)]
OFTEN = 10  # times over in an epoch are said


@app.command()
def train(
    data: Data,
    out: Annotated[Path, option("FOLDER", "Folder to write; it appears whole or not at all.", "-o", "--out")],
    layout: LayoutOption = "folder",
    tasks: TasksOption = None,
    text_columns: TextColumns = None,
    label_columns: LabelColumns = None,
    regression: Annotated[str | None, option("A,B", "Tasks whose labels are numbers, though whole ones.")] = None,
    classes: Annotated[str | None, option("A,B", "Tasks whose labels are classes, though they have decimals.")] = None,
    multi_label: Annotated[
        str | None, option("A,B", "Tasks of which several labels may hold, separated by commas in a cell.")
    ] = None,
    class_weights: Annotated[str | None, option("TEXT", "balanced, or a json file of {task: {label: weight}}.")] = None,
    model: Annotated[str, option("TEXT", "textcnn, or a folder or hub id of an encoder.")] = "textcnn",
    vectors: Annotated[Path | None, option("FILE", "Word vectors in GloVe's text format, plain or .gz.")] = None,
    weighting: Annotated[
        Weightings | None, option("NAME", f"{', '.join(get_args(Weightings))} (default: bandit; of one task uniform).")
    ] = None,
    min_effective_tasks: Annotated[
        float | None, option("X", "bandit: at least so many tasks keep weight, instead of --rho.")
    ] = None,
    rho: Annotated[
        str | None, option("X", "bandit: radius of the ball, or a share of the largest (default 10%).")
    ] = None,
    prior: Annotated[
        Literal["uniform", "sqrt", "proportional"],
        option(None, "bandit: weights in the ball's middle, by the tasks' sizes, and rows of a task in a step."),
    ] = "uniform",
    eta: Annotated[float | None, option("X", "bandit (default 0.2), groupdro (0.01): step of the weights.")] = None,
    normalize: Annotated[bool, option(None, "bandit: losses over each task's first.")] = False,
    epochs: Annotated[
        int, option("N", "At most; an epoch shows the largest task once (by --prior of sizes: every row).")
    ] = 20,
    patience: Annotated[int, option("N", "Stop after so many epochs without a better one.")] = 3,
    pick: Annotated[
        Literal["accuracy", "macro-f1", "micro-f1", "mcc", "pearson", "spearman", "loss"],
        option(None, "Which mean over the tasks stops, and picks the epoch; a task without it counts with its own."),
    ] = "accuracy",
    batch_size: Annotated[
        int, option("N", "Examples of every task in a step (by --prior of sizes: on the average).")
    ] = 32,
    lr: Annotated[float | None, option("X", "Step of Adam (default 1e-3; 2e-5 for an encoder).")] = None,
    width: Annotated[int | None, option("N", "Filters per kernel of textcnn (100).")] = None,
    dimension: Annotated[int | None, option("N", "Of word vectors when there is no --vectors (100).")] = None,
    dropout: Annotated[float, option("X", "Share of the features dropped in training.")] = 0.5,
    max_tokens: Annotated[int, option("N", "Longer texts are cut.")] = 256,
    freeze_vectors: Annotated[bool, option(None, "Leave the word vectors as read.", "--freeze-vectors")] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Train one model on all tasks, and write it with its history.

    Example:
      counterpoise multitask train --data reviews -o model --weighting bandit
    """
    asked: dict[str, Any] = {
        "rho": _radius(rho),
        "min_effective_tasks": min_effective_tasks,
        "eta": eta,
        "normalize": normalize,
    }
    with plain_errors("nothing was written", KeyError, ImportError), bars(quiet) as progress:
        from dataclasses import asdict

        from counterpoise.checkpoints.files import refuse_occupied
        from counterpoise.classification import balance, classifier, doubts, models, saving, training, weighted
        from counterpoise.classification.parts import SPLITS
        from counterpoise.records import versions, write_whole
        from counterpoise.report.multitask import multitask_page

        refuse_occupied(out.absolute())
        design = models.Design(model, 100 if width is None else width, (3, 5, 7), dropout, max_tokens, freeze_vectors)
        if not design.takes_words:
            options.refuse_without("--model textcnn", options.given(width=width, dimension=dimension))
        if vectors is None:
            options.refuse_without("--vectors", options.given(freeze_vectors=freeze_vectors or None))
        else:
            options.refuse_without("no --vectors, which have one", options.given(dimension=dimension))
        pace: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "patience": patience, "pick": pick}
        training.check_pace(**pace, lr=lr)
        balance.check_weighting(weighting or "bandit", **asked, prior=None if prior == "uniform" else [1.0])
        weights = _class_weights(class_weights)
        kinds = _kinds(number=regression, classes=classes, labels=multi_label)
        chosen = None if tasks is None else _names(tasks)
        columns, need = (text_columns, label_columns), ("train", "validation")
        found = _read(data, layout, chosen, columns, kinds=kinds, need=need)
        several = len(found) > 1 or prior != "uniform" or any(asked.values())
        weighting = weighting or ("bandit" if several else "uniform")
        found = weighted(found, weights) if weights else found
        power = {"uniform": 0.0, "sqrt": 0.5, "proportional": 1.0}[prior]
        sizes = [len(t.train) ** power for t in found] if power else None
        built = classifier.build_classifier(
            found, design, vectors=vectors, dimension=dimension or 100, seed=seed, device=options.device_of(device)
        )
        rounds = training.rounds_per_epoch(found, batch_size)
        weighing = balance.weighting_for(weighting, built, rounds_per_epoch=rounds, prior=sizes, **asked)
        for t in found:
            doubts.of_parts(t.name, {p: t.split(p).texts for p in SPLITS})
        _say_repeats(found, sizes, batch_size, rounds)
        run = training.train(found, built, weighing, lr=lr, seed=seed, progress=progress, **pace)
        tested = classifier.evaluate(built, [t for t in found if len(t.test)])
        _say_left_out(found)
        told = {"data": str(data), "layout": layout, "weighting": weighting, "seed": seed, "batch_size": batch_size}
        told |= {"text_columns": text_columns, "label_columns": label_columns}
        told |= {"vectors": None if vectors is None else str(vectors), "lr": lr, **asdict(design)}
        record = {
            **told,
            **asked,
            "prior": prior,
            "pick": pick,
            "class_weights": weights,
            "kinds": {t.name: t.kind for t in found},
            "rho": getattr(weighing, "rho", None),
            "eta": getattr(weighing, "eta", None),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "examples": {t.name: [len(t.train), len(t.validation), len(t.test)] for t in found},
            "command": command_line(),
            **asdict(run),
            "test": {name: score.told() for name, score in tested.items()},
        }
        page = multitask_page(record)
        saving.save(built, out, record, also=lambda folder: write_whole(folder / saving.REPORT, page))
    if as_json:
        print_json(record)
        return
    best = run.epochs[run.best_epoch - 1]
    print(f"best epoch {run.best_epoch} of {len(run.epochs)} ({run.stopped}), {run.epochs[-1].seconds:.0f} s")
    all_have_it = pick == "loss" or all(pick in figures for figures in best.validation.values())
    judged = scores_table.SHOWN.get(pick, pick) if all_have_it else "figures"
    print(f"validation {judged} {scores_table.shown(pick, best.mean(pick))}, task variance {best.task_variance:.4g}")
    if tested:
        scores_table.show(tested)
    print(f"wrote {out}; the run as a page: {out / saving.REPORT}")


@app.command()
def evaluate(
    model: ModelFolder,
    data: Data,
    layout: Annotated[Literal["folder", "glue"] | None, option(None, "Default: as in training.")] = None,
    tasks: TasksOption = None,
    text_columns: Annotated[str | None, option("A,B", "Default: as in training.")] = None,
    label_columns: Annotated[str | None, option("A,B", "Default: as in training.")] = None,
    part: Annotated[Literal["test", "validation", "train", "all"], option(None, "Of the data.")] = "test",
    batch_size: TextsAtOnce = 64,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """The figures of every task the model has, on held-out data.

    Example:
      counterpoise multitask evaluate model --data reviews
    """
    with plain_errors("nothing was changed", KeyError, ImportError):
        from counterpoise.classification import classifier, saving
        from counterpoise.classification.data import whole
        from counterpoise.classification.parts import SPLITS, SplitName

        loaded, told = saving.load(model, device=options.device_of(device)), saving.recorded(model)
        layout = layout or told.get("layout", "folder")
        if layout == "folder":  # what training read of its files is what a test is about
            text_columns, label_columns = (
                given or told.get(name)
                for given, name in ((text_columns, "text_columns"), (label_columns, "label_columns"))
            )
        chosen = list(loaded.tasks) if tasks is None else _names(tasks)
        kinds = {name: loaded.targets[loaded.task(name)].kind for name in chosen} if layout == "folder" else {}
        found = _read(data, layout, chosen, (text_columns, label_columns), kinds=kinds, need=())
        of: SplitName = "test" if part == "all" else part
        found = [whole(t) for t in found] if part == "all" else found
        _say_left_out(found, of)
        scores = classifier.evaluate(loaded, [t for t in found if len(t.split(of))] or found, of, batch_size=batch_size)
        for t in found if part == "test" and str(data) != told.get("data") else ():
            if (rows := sum(len(t.split(p)) for p in SPLITS)) > len(t.test):
                say(f"note: {t.name}: {len(t.test)} of {rows} rows, those for a test; --part all takes every one")
    if as_json:
        print_json([{"task": name, **score.told()} for name, score in scores.items()])
    else:
        scores_table.show(scores)


@app.command()
def predict(
    model: ModelFolder,
    task: Annotated[str, option("TEXT", "Which of the model's tasks.")],
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", help="One text; without it, a text a line from stdin.")
    ] = None,
    second: Annotated[
        str | None, typer.Argument(metavar="[TEXT2]", help="The other one of a pair; on stdin a tab is between them.")
    ] = None,
    batch_size: TextsAtOnce = 64,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """The answer to each text: task, label and probability, separated by tabs; --json gives every label's, a line a text.

    Example:
      counterpoise multitask predict model --task books "It kept me up all night."
    """
    with plain_errors("nothing was changed", KeyError, ImportError), until_enough_is_read():
        from counterpoise.classification import saving

        loaded = saving.load(model, device=options.device_of(device))
        target, answered = loaded.targets[loaded.task(task)], False

        def typed() -> Iterator[Any]:
            for number, line in lines.stdin():
                asked: Any = tuple(line.split("\t")) if target.pair and "\t" in line else line
                try:
                    loaded.check_texts(task, [asked])
                except ValueError as error:
                    raise ValueError(f"stdin, line {number}: {error}") from None
                yield asked

        given: Any = [[text if second is None else (text, second)]]
        for texts in given if text is not None else lines.as_they_come(typed(), batch_size):
            for row in loaded.probabilities(task, texts, batch_size=batch_size).tolist():
                answered, (label, probability) = True, loaded.prediction(task, row)
                if as_json:
                    print(json.dumps({"task": task, **target.told(row)}), flush=True)
                else:
                    print(task, label, *([] if probability is None else [f"{probability:.4f}"]), sep="\t", flush=True)
        if not answered:
            raise ValueError("expected a text, or texts on stdin, one a line; found none")


@app.command()
def export(
    model: ModelFolder,
    out: Annotated[Path, option("FOLDER", "New folder, with one folder in it for each task.", "-o", "--out")],
    tasks: TasksOption = None,
    quiet: options.Quiet = False,
) -> None:
    """Write each task as a model that AutoModelForSequenceClassification loads, with the same answers.

    Example:
      counterpoise multitask export model -o exported
    """
    with plain_errors("nothing was written", KeyError, ImportError):
        from counterpoise.checkpoints.files import refuse_occupied
        from counterpoise.classification import saving

        refuse_occupied(out.absolute())
        for place in saving.export(saving.load(model), out, _names(tasks)):
            print(f"wrote {place}")


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _read(data: Path, layout: Any, tasks: Any, columns: Sequence[str | None], **more: Any) -> list[TaskData]:
    from counterpoise.classification.data import read_tasks

    texts, label = map(_names, columns)
    return read_tasks(data, layout, tasks=tasks, texts=texts, label=label, **more)


def _kinds(**asked: str | None) -> dict[str, Any]:
    """The kind of each task that an option names."""
    found: dict[str, Any] = {}
    for kind, names in asked.items():
        for name in _names(names):
            if found.setdefault(name, kind) != kind:
                raise ValueError(
                    f"--regression, --classes, --multi-label: expected a task in one of them, found {name!r} in two"
                )
    return found


def _radius(given: str | None) -> float | str | None:
    """A number, or what BanditMTL reads as a share."""
    try:
        return given and float(given)
    except ValueError:
        return given


def _class_weights(given: str | None) -> Any:
    from counterpoise.checkpoints.reading import json_object, read_text

    if given in (None, "balanced"):
        return given
    if not Path(given).is_file():
        raise ValueError(f"--class-weights: expected balanced, or a json file by task and label, found {given!r}")
    return json_object(read_text(given), given)


def _say_left_out(tasks: list[TaskData], part: Any = "test") -> None:
    for task in (t.name for t in tasks if not len(t.split(part))):
        warnings.warn(f"{task} has no rows for {part}, and is left out of the table", stacklevel=2)


def _say_repeats(tasks: list[TaskData], sizes: list[float] | None, batch: int, rounds: int) -> None:
    """Say which task an epoch shows most often, where that is more than a few times."""
    rows = [len(t.train) for t in tasks]
    shown = [sum(rows) * x / sum(sizes) for x in sizes] if sizes else [float(rounds * min(batch, n)) for n in rows]
    times, name = max((x / n, t.name) for x, n, t in zip(shown, rows, tasks, strict=True))
    if times > OFTEN:
        say(f"note: an epoch shows {name} {times:.0f} times over; --prior proportional does not")
