"""Training a text classifier on all its tasks at once."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from counterpoise.classification.balance import weighting_for
from counterpoise.classification.classifier import TextClassifier
from counterpoise.classification.data import TaskData
from counterpoise.classification.models import seeded
from counterpoise.classification.parts import SPLITS
from counterpoise.classification.targets import figure
from counterpoise.multitask import BanditMTL, Weighting
from counterpoise.multitask.drawing import quotas
from counterpoise.multitask.losses import by_task
from counterpoise.records import Stages

Metric = Literal["accuracy", "macro-f1", "micro-f1", "mcc", "pearson", "spearman", "loss"]
"""What the best epoch may be picked by, on validation data; a task without that figure counts with the one it is judged by
(`figure`)."""
EVERY = 10
"""Rounds between two entries of a run's history."""
CUT = 0.2
"""A larger share of texts that are cut is said."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to.

    Attributes:
        epoch: 1 for the first.
        seconds: since the start, validation included.
        train_loss: by task, mean over the epoch's rounds of the loss in training, see `Score`; with class weights, with
            them.
        task_variance: of `train_loss` over the tasks, with 1/m.
        validation_loss, validation: by task, after the epoch; `Score.figures`.
    """

    epoch: int
    seconds: float
    train_loss: dict[str, float]
    task_variance: float
    validation_loss: dict[str, float]
    validation: dict[str, dict[str, float]]

    @property
    def validation_accuracy(self) -> dict[str, float]:
        """By task, the accuracy, or the figure that a task of another kind is judged by."""
        return {name: figure(figures, "accuracy") for name, figures in self.validation.items()}

    def mean(self, metric: Metric = "accuracy") -> float:
        """A validation figure's mean over the tasks."""
        losses = self.validation_loss
        found = losses if metric == "loss" else {name: figure(x, metric) for name, x in self.validation.items()}
        return sum(found.values()) / len(found)


@dataclass(frozen=True)
class Training:
    """A finished run.

    Attributes:
        epochs: all of them.
        rounds: the weighting's `metrics()` (task losses, weights, task variance, ...) with the number of the `round`,
            every so many rounds.
        best_epoch: the one whose weights the model holds.
        stopped: why it ended.
    """

    epochs: list[Epoch]
    rounds: list[dict[str, float]]
    best_epoch: int
    stopped: str


def rounds_per_epoch(tasks: Sequence[TaskData], batch_size: int) -> int:
    """Rounds until the largest task has been seen once; smaller tasks come round again meanwhile."""
    return math.ceil(max(len(t.train) for t in tasks) / batch_size)


def check_pace(*, epochs: int, patience: int, batch_size: int, lr: float | None, pick: Metric = "accuracy") -> None:
    """Raise for settings of `train` that are out of range.

    Raises:
        ValueError: a count below 1, a rate that is not positive.
    """
    if min(epochs, patience) < 1:
        raise ValueError(f"epochs, patience: expected at least 1, found {epochs}, {patience}")
    if pick not in get_args(Metric):
        raise ValueError(f"pick: expected one of {', '.join(get_args(Metric))}, found {pick!r}")
    if batch_size < 1:
        raise ValueError(f"batch size: expected at least 1, found {batch_size}")
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr: expected a positive number, found {lr}")


def train(
    tasks: Sequence[TaskData],
    classifier: TextClassifier,
    weighting: Weighting | str = "bandit",
    *,
    epochs: int = 20,
    rounds: int | None = None,
    batch_size: int = 32,
    lr: float | None = None,
    patience: int = 3,
    seed: int = 0,
    pick: Metric = "accuracy",
    progress: Stages | None = None,
    after_epoch: Callable[[Epoch], None] | None = None,
) -> Training:
    """Train in rounds: a mini-batch of every task, one weighted loss, one step of Adam.

    After each epoch every task is scored on its validation part. Training ends after `patience` epochs without a better
    mean over the tasks of `pick` (an equal one is no better), and the model gets back the weights of its best epoch.
    The same seed on the same CPU gives the same numbers; torch's global generator is left as it was.

    Args:
        tasks: the classifier's tasks, in its order, with training and validation parts; their class weights (`weighted`)
            count in training alone.
        classifier: trained in place.
        weighting: a fresh one over the same tasks, or a name for `weighting_for` with its defaults.
        epochs: the most.
        rounds: in an epoch; by default `rounds_per_epoch`. Tasks trained alone that are to take as many steps as together
            get the number of all tasks.
        batch_size: examples of each task in a round; all, of a task with fewer. With a prior of numbers (`BanditMTL`)
            a round has that many times the tasks, shared out by it, and an epoch as many rounds as the data fill.
        lr: step size; by default 1e-3 for word models and 2e-5 for Hugging Face encoders, as in BanditMTL's line of
            work.
        patience: epochs without a better one before it ends.
        seed: of the mini-batches and dropout.
        pick: the figure that stops training and picks the epoch.
        progress: told of every round.
        after_epoch: called with each epoch once it is scored, the model as it then is; it must leave it so.

    Raises:
        ValueError: other tasks than the classifier's or the weighting's, numbers out of range, an empty part, or a loss
            that is no number before the first epoch is over (later, training stops at the best epoch).
    """
    check_pace(epochs=epochs, patience=patience, pick=pick, batch_size=batch_size, lr=lr)
    if [t.name for t in tasks] != list(classifier.tasks):
        raise ValueError(f"expected the classifier's tasks {list(classifier.tasks)}, found {[t.name for t in tasks]}")
    if rounds is None:
        rounds = rounds_per_epoch(tasks, batch_size)
        if _shares(weighting) is not None:
            rounds = math.ceil(sum(len(t.train) for t in tasks) / (len(tasks) * batch_size))
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, found {rounds}")
    if isinstance(weighting, str):
        weighting = weighting_for(weighting, classifier, rounds_per_epoch=rounds)
    if list(weighting.tasks) != list(classifier.tasks):
        raise ValueError(f"expected a weighting over {list(classifier.tasks)}, found one over {list(weighting.tasks)}")
    lr = (1e-3 if classifier.design.takes_words else 2e-5) if lr is None else lr
    with seeded(seed, classifier.device):
        run = _Run(tasks, classifier, weighting, batch_size, lr, seed)
        for epoch in range(1, epochs + 1):
            for done in range(1, rounds + 1):
                if unusable := run.round():
                    return run.finish(f"in epoch {epoch} the loss of {unusable} was no number; try a smaller lr")
                if run.rounds % EVERY == 0 or run.rounds == 1:
                    run.history.append({"round": float(run.rounds), **weighting.metrics()})
                if progress is not None:
                    progress("training", (epoch - 1) * rounds + done, epochs * rounds)
            run.validate(epoch, pick)
            if after_epoch is not None:
                after_epoch(run.epochs[-1])
            if epoch - run.best_epoch >= patience:
                return run.finish(f"{patience} epochs without a better one")
        return run.finish("all epochs done")


class _Run:
    """The state of a training run."""

    def __init__(
        self,
        tasks: Sequence[TaskData],
        classifier: TextClassifier,
        weighting: Weighting,
        batch: int,
        lr: float,
        seed: int,
    ) -> None:
        self.classifier, self.weighting = classifier, weighting
        for part in SPLITS[:2]:
            if empty := [t.name for t in tasks if not len(t.split(part))]:
                raise ValueError(f"expected examples for {part}, found none for the tasks {empty}")
        self.texts = classifier.encode([text for t in tasks for text in t.train.texts])
        device = classifier.device
        if (cut := float((self.texts.lengths_N >= classifier.design.max_tokens).float().mean())) > CUT:
            warnings.warn(
                f"{100 * cut:.0f} % of the training texts have max_tokens={classifier.design.max_tokens} tokens or more; what "
                "comes after is not read",
                stacklevel=3,
            )
        truth = [classifier.classes(t.name, t.train.labels) for t in tasks]
        self.truth = [y.to(device, torch.float32 if y.is_floating_point() else None) for y in truth]
        weights = [torch.tensor(t.weights, device=device) if t.weights else None for t in tasks]
        targets = zip(classifier.targets.values(), weights, strict=True)
        self.losses = [partial(target.loss, weights_C=weights_C) for target, weights_C in targets]
        held = {t.name: t.validation for t in tasks}
        self.validation = {n: (classifier.encode(s.texts), classifier.classes(n, s.labels)) for n, s in held.items()}
        ends = accumulate((len(t.train) for t in tasks), initial=0)
        random = torch.Generator().manual_seed(seed)
        bounds = list(pairwise(ends))
        self.rows, self.first = [_rows(first, end, random) for first, end in bounds], [first for first, _ in bounds]
        self.shares = _shares(weighting)
        self.batch, self.seed, self.most = batch, seed, [min(batch, end - first) for first, end in bounds]
        learned = [p for p in [*classifier.model.parameters(), *weighting.parameters()] if p.requires_grad]
        self.optimizer = torch.optim.Adam(learned, lr=lr)
        self.start = time.perf_counter()
        self.epochs: list[Epoch] = []
        self.history: list[dict[str, float]] = []
        self.sums_M = torch.zeros(len(tasks), dtype=torch.float64)
        self.seen_M, self.rounds = torch.zeros_like(self.sums_M), 0
        self.best_epoch, self.best_weights = 0, dict[str, Tensor]()

    def draw(self) -> list[Tensor]:
        """The next round's rows of each task."""
        sizes = self.most
        if self.shares is not None:
            u = np.random.default_rng([self.seed, self.rounds]).random()
            sizes = quotas(self.shares, len(sizes) * self.batch, u)
        return [torch.tensor(list(islice(rows, n)), dtype=torch.long) for rows, n in zip(self.rows, sizes, strict=True)]

    def round(self) -> list[str]:
        """One optimiser step; the tasks whose loss was no number, in which case nothing was changed."""
        model = self.classifier.model.train()
        drawn = self.draw()
        sizes = [len(rows_B) for rows_B in drawn]
        # Methods that look at each task's gradient get a graph of its own for each task: a backward pass then costs
        # that task's rows alone, where one graph of all rows would make it cost the whole batch, once per task.
        alone = getattr(self.weighting, "whole_batch_only", False)
        chosen = drawn if alone else [torch.cat(drawn)]
        features = [model(*self.texts.batch(rows_B)) for rows_B in chosen]
        parts = features if alone else torch.split(features[0], sizes)
        # One by one: stacked, a backward pass from one of them would run through the graphs of all.
        losses = [self.loss(i, x_BF, rows_B) for i, (x_BF, rows_B) in enumerate(zip(parts, drawn, strict=True))]
        values_M = torch.stack([torch.zeros(()) if x is None else x.detach().cpu() for x in losses]).double()
        usable = zip(self.classifier.tasks, values_M.isfinite().tolist(), strict=True)
        if unusable := [name for name, is_number in usable if not is_number]:
            return unusable
        seen: dict[str, Tensor] = {}
        if getattr(self.weighting, "sees_features", False):  # as experiments/banditmtl/adversarial.py
            task_B = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
            seen = {"features_BF": features[0], "task_B": task_B.to(features[0].device)}
        self.optimizer.zero_grad(set_to_none=True)
        self.weighting(losses, None if self.shares is None else sizes, **seen).backward()
        self.optimizer.step()
        self.weighting.step()
        self.sums_M += values_M
        self.seen_M += torch.tensor([x is not None for x in losses])
        self.rounds += 1
        return []

    def loss(self, task: int, features_BF: Tensor, rows_B: Tensor) -> Tensor | None:
        """A task's mean loss on some of its rows, which count from the first task's first."""
        if not len(rows_B):
            return None
        truth = self.truth[task][(rows_B - self.first[task]).to(features_BF.device)]
        return self.losses[task](self.classifier.model.logits(features_BF, task), truth)

    def validate(self, epoch: int, pick: Metric) -> None:
        """Close an epoch: score every task, remember the weights if they are the best."""
        means_M = self.sums_M / self.seen_M.clamp(min=1.0)
        self.sums_M, self.seen_M = torch.zeros_like(self.sums_M), torch.zeros_like(self.seen_M)
        scores = {name: self.classifier.score(name, *part) for name, part in self.validation.items()}
        this = Epoch(
            epoch=epoch,
            seconds=time.perf_counter() - self.start,
            train_loss=dict(zip(scores, means_M.tolist(), strict=True)),
            task_variance=float(means_M.var(correction=0)),
            validation_loss={n: s.loss for n, s in scores.items()},
            validation={n: s.figures for n, s in scores.items()},
        )
        self.epochs.append(this)
        sign = -1.0 if pick == "loss" else 1.0
        if not self.best_epoch or sign * this.mean(pick) > sign * self.epochs[self.best_epoch - 1].mean(pick):
            self.best_epoch = epoch
            state = self.classifier.model.state_dict()
            self.best_weights = {k: v.detach().cpu().clone() for k, v in state.items()}

    def finish(self, why: str) -> Training:
        """Give the model back its best weights."""
        if not self.best_epoch:
            raise ValueError(f"training gave nothing: {why}")
        self.classifier.model.load_state_dict(self.best_weights)
        self.classifier.model.eval()
        return Training(self.epochs, self.history, self.best_epoch, why)


def _shares(weighting: Weighting | str) -> list[float] | None:
    """Each task's share of a round's rows, by a prior of numbers; None: as many of each."""
    if not isinstance(weighting, BanditMTL) or weighting.prior == "uniform":
        return None
    if isinstance(weighting.prior, str | float | int):
        raise ValueError(
            f"weighting: prior={weighting.prior!r} follows the rows of the batches, which are drawn here by the prior itself; "
            "give a number per task, such as the sizes of their training data or the roots of them"
        )
    numbers = by_task(weighting.tasks, weighting.prior, "prior")
    return [x / sum(numbers) for x in numbers]


def _rows(first: int, end: int, random: torch.Generator) -> Iterator[int]:
    """The rows [first, end) without end, in a new order each time round."""
    while True:
        yield from (first + torch.randperm(end - first, generator=random)).tolist()
