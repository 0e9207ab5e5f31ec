"""What a task asks of its head: one class of several, any number of labels, or a number; its loss, scores and answers."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["classes", "labels", "number"]
"""One label of several; any number of labels; a number."""
Label = str | float | tuple[str, ...]
"""A class, a number, or all the labels that hold."""
Weights = Literal["balanced"] | Mapping[str, Mapping[str, float]]
"""How much a row counts by its label: every class as much as another, or numbers by task and label."""

MAIN = ("accuracy", "macro-f1", "pearson-spearman")
"""The figure that a task is judged by: the first that it has."""
PROBLEM: dict[Kind, str] = {
    "classes": "single_label_classification", "labels": "multi_label_classification", "number": "regression",
}  # fmt: skip
"""As transformers says it."""
FAR = 10.0
"""So many deviations from 0, and a head without a bias is said to be a poor choice."""


class Score(NamedTuple):
    """How a task fares on a part.

    Attributes:
        loss: mean cross-entropy in nats, over the labels too where several may hold; of a number the mean square error
            over the variance of the training labels.
        examples: how many.
        figures: of classes accuracy, macro-f1 and mcc; of several labels macro-f1, micro-f1 and exact (the share of rows
            with every label right); of a number pearson-spearman (their mean), pearson and spearman. The mean F1 is that
            of the classes that occur, or are answered, in the part. A correlation (mcc: Matthews', for several classes
            Gorodkin's) is 0 where every answer or label is the same.
        classes: precision, recall, F1 and number of examples of each label.
    """

    loss: float
    examples: int
    figures: dict[str, float]
    classes: dict[str, dict[str, float]]

    @property
    def accuracy(self) -> float:
        """Share of right classes."""
        return self.figures["accuracy"]

    def told(self) -> dict[str, Any]:
        """One flat record."""
        return {k.replace("-", "_"): x for k, x in self.figures.items()} | {
            "loss": self.loss, "examples": self.examples, "classes": self.classes,
        }  # fmt: skip


def figure(figures: Mapping[str, float], asked: str) -> float:
    """The figure that is asked for, where the task has it, or the one it is judged by."""
    return figures[asked if asked in figures else next(name for name in MAIN if name in figures)]


@dataclass(frozen=True)
class Target:
    """What a task's head answers.

    Attributes:
        labels: in the order of its outputs; of a number its name.
        kind: see `Kind`.
        pair: it reads two texts.
        mean, scale: of a number; the head answers (number - mean) / scale.
        deviation: of a number, the standard deviation of the training labels, in which its loss is told; 0: scale.
    """

    labels: tuple[str, ...]
    kind: Kind = "classes"
    pair: bool = False
    mean: float = 0.0
    scale: float = 1.0
    deviation: float = 0.0

    def fitted(self, task: str, labels: Sequence[Label], *, centred: bool) -> Target:
        """With the mean and the spread of these training labels, where they are numbers; without the mean for a head that
        cannot add it (not `centred`)."""
        if self.kind != "number":
            return self
        values_N = _numbers(task, labels)
        middle = float(values_N.mean())
        mean, deviation = middle if centred else 0.0, float((values_N - middle).square().mean().sqrt())
        if float(values_N.max() - values_N.min()) == 0.0:
            warnings.warn(
                f"task {task!r}: all its training labels are {values_N[0]:g}; nothing can be learned", stacklevel=3
            )
            return replace(self, mean=mean)
        if not centred and abs(middle) > FAR * deviation:
            warnings.warn(
                f"task {task!r}: the mean of its training labels is {abs(middle) / deviation:.0f} of their standard deviations, "
                "and this model's head has no bias to answer it with; take the mean off the labels, or an encoder such as BERT",
                stacklevel=3,
            )
        scale = float((values_N - mean).square().mean().sqrt())
        return replace(self, mean=mean, scale=scale, deviation=deviation)

    def encode(self, task: str, labels: Sequence[Label]) -> Tensor:
        """What the loss compares with: (N,) int64, (N, C) float32 of 0 and 1, or (N, 1) float64."""
        if self.kind == "number":  # as ranks need them: in float32 large numbers would tie
            return ((_numbers(task, labels) - self.mean) / self.scale).unsqueeze(1)
        place = {label: i for i, label in enumerate(self.labels)}
        if self.kind == "classes":
            place |= {x: place[known] for x in {*map(str, labels)} if (known := self._of_value(x)) is not None}
        rows: list[tuple[str, ...]] = [x if isinstance(x, tuple) else (str(x),) for x in labels]
        if strange := sorted({x for row in rows for x in row} - place.keys()):
            raise ValueError(f"task {task!r}: expected the model's labels {list(self.labels)}, found {strange}")
        if self.kind == "classes":
            if several := next((row for row in rows if len(row) != 1), None):
                raise ValueError(f"task {task!r}: expected one label a text, found {list(several)}")
            return torch.tensor([place[x] for (x,) in rows], dtype=torch.long)
        holds_NC = torch.zeros(len(rows), len(place))
        for n, row in enumerate(rows):
            holds_NC[n, [place[x] for x in row]] = 1.0
        return holds_NC

    def _of_value(self, label: str) -> str | None:
        """Of a number that is not among the labels as it is spelled, the label of its value: 1 for 1.0."""
        if label in self.labels or not re.fullmatch(r"-?\d+(\.\d*)?", label):
            return None
        numbers = (x for x in self.labels if re.fullmatch(r"-?\d+(\.\d*)?", x))
        return next((x for x in numbers if float(x) == float(label)), None)

    def weights(self, task: str, asked: Weights, labels: Sequence[Label]) -> tuple[float, ...]:
        """What a class counts, or what a label counts where it holds; nothing for a number.

        Balanced: rows over classes times the class's rows (scikit-learn's rule), rows without over rows with a label (1 where all
        have it).

        Raises:
            ValueError: numbers for unknown labels, below 0, or for a task of numbers.
        """
        if asked == "balanced":
            n, several = len(labels), self.kind == "labels"
            count = Counter(x for row in labels for x in (row if isinstance(row, tuple) else (str(row),)))
            each = [count[x] or 1 for x in (() if self.kind == "number" else self.labels)]
            return tuple(((n - c) / c if c < n else 1.0) if several else n / (len(each) * c) for c in each)
        given = asked.get(task, {})
        if not isinstance(given, Mapping) or set(given) - (set() if self.kind == "number" else {*self.labels}):
            raise ValueError(f"class weights of {task!r}: expected numbers by its labels {self.labels}, found {given}")
        values = [given.get(x, 1.0) for x in self.labels]
        if not all(isinstance(x, int | float) and 0.0 <= x < math.inf for x in values):
            raise ValueError(f"class weights of {task!r}: expected finite numbers, at least 0, found {given}")
        return tuple(float(x) for x in values) if given else ()

    def loss(self, logits_BC: Tensor, truth: Tensor, weights_C: Tensor | None = None) -> Tensor:
        """The mean loss of some rows."""
        if self.kind == "number":
            unit = (self.scale / self.deviation) ** 2 if self.deviation else 1.0
            return unit * F.mse_loss(logits_BC, truth.to(logits_BC.dtype))
        if self.kind == "labels":
            return F.binary_cross_entropy_with_logits(logits_BC, truth.to(logits_BC.dtype), pos_weight=weights_C)
        if weights_C is None:
            return F.cross_entropy(logits_BC, truth)
        # Over the rows, not over their weights, as `reduction="mean"` would: small batches then add up to large ones.
        return F.cross_entropy(logits_BC, truth, weights_C, reduction="sum") / len(truth)

    def answers(self, logits_NC: Tensor) -> Tensor:
        """The probability of each label, or the number, (N, C)."""
        if self.kind == "number":
            return logits_NC * self.scale + self.mean
        return logits_NC.sigmoid() if self.kind == "labels" else logits_NC.softmax(dim=1)

    def told(self, row: Sequence[float]) -> dict[str, Any]:
        """A row of `answers` as a record: the number by its name, else the label or the labels, and all with theirs."""
        every = dict(zip(self.labels, row, strict=True))
        if self.kind == "classes":
            label, probability = max(every.items(), key=lambda pair: pair[1])
            return {"label": label, "probability": probability, "all": every}
        return every if self.kind == "number" else {"labels": [x for x, p in every.items() if p > 0.5], "all": every}

    def score(self, logits_NC: Tensor, truth: Tensor) -> Score:
        """How logits in float64 fare."""
        several = self.kind == "labels"
        loss, n = float(self.loss(logits_NC, truth)), len(truth)
        if self.kind == "number":
            from scipy.stats import pearsonr, spearmanr

            said, true = logits_NC[:, 0].numpy(), truth[:, 0].numpy()
            varies = min(said.max() - said.min(), true.max() - true.min()) > 0.0
            r, rank = (float(f(said, true).statistic) if varies else 0.0 for f in (pearsonr, spearmanr))
            return Score(loss, n, {"pearson-spearman": (r + rank) / 2, "pearson": r, "spearman": rank}, {})
        said_NC = logits_NC > 0.0 if several else F.one_hot(logits_NC.argmax(1), len(self.labels)).bool()
        true_NC = truth > 0.5 if several else F.one_hot(truth, len(self.labels)).bool()
        hits_C, true_C, said_C = (x_NC.sum(0).double() for x_NC in (said_NC & true_NC, true_NC, said_NC))
        rates_3C = hits_C / said_C.clamp(min=1.0), hits_C / true_C.clamp(min=1.0), 2 * hits_C / (true_C + said_C)
        rows = zip(*(x_C.nan_to_num().tolist() for x_C in (*rates_3C, true_C)), strict=True)
        names = ("precision", "recall", "f1", "examples")
        classes = {label: dict(zip(names, row, strict=True)) for label, row in zip(self.labels, rows, strict=True)}
        macro = float(rates_3C[2].nanmean().nan_to_num())
        if several:
            micro = float((2 * hits_C.sum() / (true_C.sum() + said_C.sum())).nan_to_num())
            exact = float((said_NC == true_NC).all(1).double().mean())
            return Score(loss, n, {"macro-f1": macro, "micro-f1": micro, "exact": exact}, classes)
        spread = ((n**2 - said_C @ said_C) * (n**2 - true_C @ true_C)).sqrt()
        mcc = float((hits_C.sum() * n - true_C @ said_C) / spread) if spread > 0 else 0.0
        return Score(loss, n, {"accuracy": float(hits_C.sum() / n), "macro-f1": macro, "mcc": mcc}, classes)


def _numbers(task: str, labels: Sequence[Label]) -> Tensor:
    try:
        return torch.tensor([float(x) for x in labels], dtype=torch.float64)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(
            f"task {task!r}: expected numbers for labels, found {sorted(map(str, labels))[-1]!r}"
        ) from None
