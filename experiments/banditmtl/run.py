"""Train every method on every data set of BanditMTL's line of work, and keep one json line per run.

    python experiments/banditmtl/run.py DATA sentiment      # 14 domains: the table, and the equal-time table
    python experiments/banditmtl/run.py DATA topic          # 4 tasks of 20 Newsgroups
    python experiments/banditmtl/run.py DATA sentiment --imbalanced
    python experiments/banditmtl/run.py DATA topic --imbalanced
    python experiments/banditmtl/run.py DATA topic --sensitivity
    python experiments/banditmtl/run.py DATA topic --longer --methods uniform,bandit,bandit-half,single
    python experiments/banditmtl/run.py DATA cost           # what an epoch of each method costs, in turn, in one run

DATA is the folder with sentiment-reviews, newsgroups and glove-50d. A run that is in results/ already is not done again,
so a killed command goes on where it was. `tables.py` makes README.md of the lines.

Every run scores validation and test data after every epoch; what is reported is the test score of the epoch of best
validation accuracy, so one set of runs gives the tables at full length, at equal time, and the curves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from adversarial import ADVERSARIAL
from layouts import read_tasks

from counterpoise.classification.balance import weighting_for
from counterpoise.classification.classifier import TextClassifier, build_classifier
from counterpoise.classification.data import Split, TaskData
from counterpoise.classification.models import Design, HardSharing, build_encoder, seeded
from counterpoise.classification.training import Epoch, rounds_per_epoch, train
from counterpoise.records import versions

HERE = Path(__file__).parent
SETTINGS: dict[str, dict[str, Any]] = {
    "sentiment": {"folder": "sentiment-reviews", "layout": "fdu-mtl", "batch": 18, "tokens": 80, "width": 32},
    "topic": {"folder": "newsgroups", "layout": "newsgroups", "batch": 64, "tokens": 80, "width": 32},
}
COMMON: dict[str, Any] = {"lr": 2e-3, "epochs": 10, "patience": 3, "vectors": "GloVe 50d, frozen", "dropout": 0.5}
LONGER = {"epochs": 40, "patience": 8}
RHO, ETA = 1.2, 0.5
"""Of a public re-implementation of BanditMTL; that they are the paper's own is unverified."""
METHODS = (
    "bandit", "uniform", "single", "uncertainty", "gradnorm", "mgda", "adversarial", "tchebycheff-adversarial", "famo",
    "upgrad", "bandit-half",
)  # fmt: skip
EFFECTIVE = {"topic": (1.2, 2.0, 3.0, 3.6)}
ETAS = (0.1, 0.5, 2.0)
KEPT = 0.05  # of the training data of the two tasks that the imbalanced runs cut


def main() -> None:
    """Parse, and run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("what", choices=(*SETTINGS, "cost"))
    parser.add_argument("--imbalanced", action="store_true", help=f"two tasks, in turn by seed, keep {KEPT:.0%}")
    parser.add_argument("--sensitivity", action="store_true", help="BanditMTL over effective tasks and eta")
    parser.add_argument("--longer", action="store_true", help=f"at most {LONGER['epochs']} epochs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "cost":
        measure_cost(options.data)
        return
    kinds = [k for k in ("sensitivity", "imbalanced", "longer") if getattr(options, k)]
    if len(kinds) > 1:
        parser.error(f"expected one of --sensitivity, --imbalanced and --longer, found {len(kinds)}")
    kind = kinds[0] if kinds else "main"
    if options.longer:
        COMMON.update(LONGER)
    store = HERE / "results" / f"{options.what}-{kind}.jsonl"
    store.parent.mkdir(exist_ok=True)
    tasks = read(options.data, options.what)
    done = {run_key(line) for line in read_lines(store)}
    methods = sensitivity_grid(options.what) if options.sensitivity else [(m, {}) for m in options.methods.split(",")]
    for seed in range(options.seeds):
        chosen = cut(tasks, seed) if options.imbalanced else tasks
        start = Start(chosen, options.what, options.data, seed)
        for method, extra in methods:
            key = {"data": options.what, "kind": kind, "method": method, "seed": seed, **extra}
            if run_key(key) in done:
                continue
            found = {**key, **run(start, method, **extra), "provenance": provenance()}
            with store.open("a", encoding="utf-8") as file:
                print(json.dumps(found), file=file)
            best = found["epochs"][found["best_epoch"] - 1]
            mean = sum(best["test_accuracy"]) / len(tasks)
            print(f"{method:24} seed {seed}  test {mean:.4f}  worst {min(best['test_accuracy']):.4f}", flush=True)


class Start:
    """What all methods of one seed have in common: the tasks, the vocabulary and its vectors."""

    def __init__(self, tasks: Sequence[TaskData], data: str, folder: Path, seed: int) -> None:
        self.tasks, self.settings, self.seed = list(tasks), SETTINGS[data], seed
        self.design = Design(
            "textcnn", self.settings["width"], (3, 5, 7), COMMON["dropout"], self.settings["tokens"], True
        )
        (vectors,) = (folder / "glove-50d").glob("*.gz")
        built = build_classifier(tasks, self.design, vectors=vectors, seed=seed)
        self.tokens, self.table_VD = built.tokens, built.model.encoder.embedding.weight.detach().clone()

    def classifier(self, tasks: Sequence[TaskData]) -> TextClassifier:
        """A fresh model for these tasks, the same start for every method."""
        with seeded(self.seed):
            encoder = build_encoder(self.design, self.table_VD)
            model = HardSharing(encoder, [len(t.labels) for t in tasks], dropout=self.design.dropout)
        return TextClassifier({t.name: t.labels for t in tasks}, self.design, self.tokens, model)


def run(start: Start, method: str, **extra: float) -> dict[str, Any]:
    """One method from start to finish; `single` trains each task on its own, with as many rounds as together."""
    if method != "single":
        return run_jointly(start, start.tasks, method, **extra)
    rounds = rounds_per_epoch(start.tasks, start.settings["batch"])
    alone = [run_jointly(start, [task], "uniform", rounds=rounds) for task in start.tasks]
    best = [one["epochs"][one["best_epoch"] - 1] for one in alone]
    joined = {name: [one[name][0] for one in best] for name in best[0] if isinstance(best[0][name], list)}
    return {
        "tasks": [t.name for t in start.tasks],
        "examples": [len(t.train) for t in start.tasks],
        "cpu_seconds": round(sum(one["cpu_seconds"] for one in alone), 1),
        "best_epoch": 1,
        "epochs": [joined],
        "stopped": "each task at its own best epoch: " + ", ".join(str(one["best_epoch"]) for one in alone),
    }


def run_jointly(
    start: Start, tasks: Sequence[TaskData], method: str, *, rounds: int | None = None, **extra: float
) -> dict[str, Any]:
    """One training of one model, scored on test data after every epoch (not timed)."""
    classifier = start.classifier(tasks)
    batch = start.settings["batch"]
    name = "bandit" if method.startswith("bandit") else method
    given: dict[str, Any] = dict(extra)
    if method == "bandit" and not extra:
        given = {"rho": RHO, "eta": ETA}
    rounds = rounds or rounds_per_epoch(tasks, batch)
    weighting = weighting_of(name, classifier, rounds, start.seed, **given)
    tests = [(t.name, classifier.encode(t.test.texts), classifier.classes(t.name, t.test.labels)) for t in tasks]
    epochs: list[dict[str, Any]] = []
    spent = 0.0
    begun = time.process_time()

    def after(epoch: Epoch) -> None:
        nonlocal spent, begun
        spent += time.process_time() - begun
        scores = [classifier.score(name, texts, classes, batch_size=256) for name, texts, classes in tests]
        weights = getattr(weighting, "weights", lambda: None)()
        epochs.append(
            {
                "cpu_seconds": round(spent, 2),
                "train_loss": rounded(epoch.train_loss.values()),
                "validation_accuracy": rounded(epoch.validation_accuracy.values()),
                "validation_loss": rounded(epoch.validation_loss.values()),
                "test_accuracy": rounded(s.accuracy for s in scores),
                "test_loss": rounded(s.loss for s in scores),
                **({"weights": rounded(weights)} if weights is not None else {}),
            }
        )
        begun = time.process_time()

    found = train(
        tasks,
        classifier,
        weighting,
        epochs=COMMON["epochs"],
        rounds=rounds,
        patience=COMMON["patience"],
        batch_size=batch,
        lr=COMMON["lr"],
        seed=start.seed,
        after_epoch=after,
    )
    return {
        "tasks": [t.name for t in tasks],
        "examples": [len(t.train) for t in tasks],
        "cpu_seconds": round(spent, 1),
        "best_epoch": found.best_epoch,
        "epochs": epochs,
        "stopped": found.stopped,
    }


def weighting_of(name: str, classifier: TextClassifier, rounds: int, seed: int, **given: float) -> Any:
    """The weighting of that name; the seed is of a discriminator's random start."""
    if name not in ADVERSARIAL:
        return weighting_for(name, classifier, rounds_per_epoch=rounds, **given)
    with seeded(seed, classifier.device):
        balance = ADVERSARIAL[name](classifier.tasks, features=classifier.model.encoder.features)
    return balance.to(classifier.device)


def sensitivity_grid(data: str) -> list[tuple[str, dict[str, float]]]:
    """BanditMTL at every pair of effective tasks and eta, and uniform weighting beside it."""
    grid = [("bandit", {"min_effective_tasks": n, "eta": eta}) for n in EFFECTIVE[data] for eta in ETAS]
    return [("uniform", {}), *grid]


def cut(tasks: Sequence[TaskData], seed: int) -> list[TaskData]:
    """The tasks with two of them, in turn by seed, cut to the first 5 % of their training examples of each class."""
    small = {(2 * seed) % len(tasks), (2 * seed + 1) % len(tasks)}
    return [dataclasses.replace(t, train=_share(t)) if i in small else t for i, t in enumerate(tasks)]


def _share(task: TaskData) -> Split:
    kept = {i for label in task.labels for i in _first_of(task.train, label)}
    rows = [(t, x) for i, (t, x) in enumerate(zip(task.train.texts, task.train.labels, strict=True)) if i in kept]
    return Split(tuple(t for t, _ in rows), tuple(x for _, x in rows))


def _first_of(part: Split, label: str) -> Iterator[int]:
    where = [i for i, x in enumerate(part.labels) if x == label]
    yield from where[: max(1, round(KEPT * len(where)))]


def measure_cost(folder: Path, rounds: int = 3, steps: int = 8) -> None:
    """Seconds of a training step of every method beside uniform weighting's, in turn on the same machine."""
    from counterpoise.classification.training import _Run

    table: dict[str, Any] = {}
    for data in SETTINGS:
        start = Start(read(folder, data), data, folder, 0)
        batch = start.settings["batch"]
        runs = {}
        for method in [m for m in METHODS if m not in ("single", "bandit-half")]:
            classifier = start.classifier(start.tasks)
            weighting = weighting_of(method, classifier, rounds_per_epoch(start.tasks, batch), 0)
            runs[method] = _Run(start.tasks, classifier, weighting, batch=batch, lr=2e-3, seed=0)
            runs[method].round()
        seconds: dict[str, list[float]] = {m: [] for m in runs}
        for _ in range(rounds * steps):
            for method, one in runs.items():
                begun = time.perf_counter()
                one.round()
                seconds[method].append(time.perf_counter() - begun)
        ratios = {m: sorted(a / b for a, b in zip(s, seconds["uniform"], strict=True)) for m, s in seconds.items()}
        table[data] = {
            m: {"seconds": round(sorted(seconds[m])[len(r) // 2], 5), "times_uniform": round(r[len(r) // 2], 3)}
            for m, r in ratios.items()
        }
        print(json.dumps(table[data], indent=1), flush=True)
    found = {"steps": table, "pairs": rounds * steps, "provenance": provenance()}
    (HERE / "results" / "cost.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read(folder: Path, data: str) -> list[TaskData]:
    """The tasks of a data set."""
    return read_tasks(folder / SETTINGS[data]["folder"], SETTINGS[data]["layout"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The runs kept so far; a line cut by a kill is dropped from the file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]), encoding="utf-8")
        lines = lines[:-1]
    return [json.loads(line) for line in lines]


def run_key(found: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one run from another."""
    return tuple(found.get(k) for k in ("data", "kind", "method", "seed", "min_effective_tasks", "eta"))


def rounded(values: Any) -> list[float]:
    """Five decimals: more than the noise of any of them."""
    return [round(float(v), 5) for v in values]


def provenance(command: str | None = None, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Commit, versions, settings and command, without machine paths; the last two as given for another script."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/experiments/banditmtl/*.py")
    commit = git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return {
        "commit": commit,
        "command": command or shlex.join(["python", "experiments/banditmtl/run.py", "DATA", *sys.argv[2:]]),
        "settings": settings or {**COMMON, **SETTINGS.get(sys.argv[2], {})},
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
