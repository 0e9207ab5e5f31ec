"""What any finished run says of each item: the one form that every log is read into, before two of them are compared."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

CALIBRATION = "calibration"
"""The aggregate of (confidence, right, Brier score) of each item; see `counterpoise.statistics.calibration`."""
UP = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1", "bleu", "logprob")
"""Metrics that are known to be better when higher, where a log does not say; logprob is made here."""
PER = {"word_perplexity": "nats/word", "byte_perplexity": "nats/byte", "bits_per_byte": "bits/byte"}
"""Metrics of lm-eval that are pairs (log-likelihood, words or bytes) per item, and the unit of their ratio here."""
Values = tuple[float, ...]


class Key(NamedTuple):
    """Hashes of a document, of its target and of the prompt that a model saw."""

    document: int
    target: int
    prompt: int


@dataclass
class Column:
    """One metric of a task.

    Attributes:
        keys: those of the items; columns of one filter share the list.
        values: per item its sufficient statistics, as in `counterpoise.statistics.bootstrap`, higher is better; None
            where the log has no finite number.
        up: False where the log's own number is better when lower, and values are its negative; None where the log does
            not say.
        reported: the number that the log itself gives.
        chance: the share of its items that guessing gets right: 1 / choices, in the mean.
        groups: the group of each item, which is resampled whole; () where each is by itself.
    """

    keys: list[Key]
    values: list[Values | None] = field(default_factory=list)
    aggregate: str = "mean"
    unit: str = ""
    up: bool | None = True
    reported: float | None = None
    chance: float = 0.0
    groups: Sequence[str] = ()

    def put(self, at: int, value: Sequence[float]) -> None:
        """The values of item `at`; those that were passed over have none."""
        self.values += [None] * (at - len(self.values))
        self.values.append(tuple(value) if all(map(math.isfinite, value)) else None)


@dataclass
class Task:
    """One task of a log: its version and number of examples in the prompt (None where the log does not say).

    Attributes:
        columns: (metric, filter) -> its items; the first one is the task's primary metric.
        left_out: metric -> why it cannot be compared.
    """

    name: str
    version: Any = None
    shots: Any = None
    columns: dict[tuple[str, str], Column] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


class Group(NamedTuple):
    """Tasks that have one number together.

    Attributes:
        weights: (metric, filter) -> the ways of weighting ("size", "macro") that give the log's own number.
    """

    tasks: tuple[str, ...]
    weights: dict[tuple[str, str], tuple[str, ...]]


@dataclass
class Log:
    """A finished run.

    Attributes:
        kind: "lm-eval", "inspect" or "counterpoise".
        named: whether the tasks' names are the log's own, or only the names of files.
        prompting: chat template, system instruction: what changes every prompt.
    """

    source: str
    kind: str
    tasks: dict[str, Task]
    groups: dict[str, Group] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    named: bool = True
    prompting: dict[str, Any] = field(default_factory=dict)


def of_item(metric: str, value: Any) -> Values | None:
    """The statistics of one item, higher is better for likelihoods, from what lm-eval says of it; None where it is no sum."""
    if isinstance(value, (bool, int, float, np.number, np.bool_)):
        return (float(value),)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    if metric in PER and all(isinstance(v, (int, float)) for v in value):
        unit = math.log(2) if metric == "bits_per_byte" else 1.0
        return float(value[0]) / unit, float(value[1])
    gold, answer = (v[0] if isinstance(v, (list, tuple)) and len(v) == 1 else v for v in value)
    if metric == "bleu" and isinstance(gold, str) and isinstance(answer, str):
        from counterpoise.evaluation.generation import bleu  # torch comes with it

        return tuple(map(float, bleu([answer], [gold])[0]))
    return None


def made_of(metric: str, width: int) -> tuple[str, str]:
    """Aggregate and unit of a metric of so many statistics an item."""
    if metric == CALIBRATION:
        return CALIBRATION, ""
    if metric in PER:
        return "ratio", PER[metric]
    return ("bleu", "BLEU") if width == 10 else ("mean", "nats" if metric in ("perplexity", "logprob") else "")


def hashed(content: Any) -> int:
    """60 bits of sha256 over a text, or over any json value as lm-eval writes it before it hashes a document."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
    return of_hex(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())


def of_hex(digest: str) -> int:
    """The same bits of a sha256 that a log holds."""
    return int(digest[:15], 16)


def close(a: float, b: float) -> bool:
    """Whether a log's own number is the one that its items give."""
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
