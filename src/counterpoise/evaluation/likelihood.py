"""Choices and continuations: how likely a model finds answers and texts that are given; nothing is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from counterpoise.evaluation.items import FileAbility, Item, Pair, Wording, text_of
from counterpoise.evaluation.measurement import Measurement
from counterpoise.language.engine import LanguageModel
from counterpoise.language.memory import Rows
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import continuation_logprobs
from counterpoise.statistics.bootstrap import Array
from counterpoise.statistics.paired import choice_calibration

SHARED = "accuracy 2"
"""What accuracy means, by version: choices of one text share. Part of the fingerprint."""


class Choices(FileAbility):
    """Lines of query, choices and gold, the number of the right one."""

    kind = "choices"
    always = ("logprob", "accuracy")

    @property
    def metric_id(self) -> str:
        """The metric with its version."""
        return SHARED

    @staticmethod
    def clean(record: dict[str, Any]) -> dict[str, Any]:
        choices, gold = record["choices"], record["gold"]
        texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
        if not texts or len(choices) < 2:
            raise ValueError("choices: expected a list of at least two texts")
        if type(gold) is not int or not 0 <= gold < len(choices):
            raise ValueError(f"gold: expected a number from 0 to {len(choices) - 1}, found {gold!r}")
        return {"query": text_of(record, "query"), "choices": choices, "gold": gold}

    @staticmethod
    def wording(fields: Mapping[str, Any]) -> Wording:
        return Wording(fields["query"], tuple(fields["choices"]))

    def right(self, fields: Mapping[str, Any]) -> tuple[str, str]:
        return fields["query"], fields["choices"][fields["gold"]]

    def score(self, model: LanguageModel, tokenizer: Any, items: Sequence[Item], drawing: Drawing) -> list[Measurement]:
        """Log-probability of the gold choice per token, and accuracy by log-probability per character."""
        contexts, groups, lengths = [], [], []
        for item in items:
            pairs = self.pairs(tokenizer, item, drawing)
            border = min(len(c) for c, _ in pairs)  # one shared context, also where a choice changes its last token
            contexts.append(pairs[0][0][:border])
            groups.append([(*c[border:], *r) for c, r in pairs])
            lengths.append([len(choice.strip()) for choice in item.fields["choices"]])
        scores = continuation_logprobs(model, contexts, groups, batch_size=drawing.batch_size)
        gold = [item.fields["gold"] for item in items]
        logp = [s[g] / len(group[g]) for s, g, group in zip(scores, gold, groups, strict=True)]
        hits = [
            credit(item.fields["choices"], g, np.divide(s, n))
            for item, s, n, g in zip(items, scores, lengths, gold, strict=True)
        ]
        chance = 100 * float(np.mean([1 / len(item.fields["choices"]) for item in items]))
        keys = tuple(item.key for item in items)
        sure = np.array([choice_calibration(s, g) for s, g in zip(scores, gold, strict=True)])
        return [
            Measurement("logprob", "nats/token", np.array(logp)[:, None], "mean", None, keys, sureness=sure),
            Measurement("accuracy", "%", np.array(hits)[:, None], "mean", chance, keys),
        ]


def credit(choices: Sequence[str], gold: int, scores: Array) -> float:
    """100 where the gold choice scores best; its share where others score as well, or say the same.

    Equal texts may score apart by rounding, in the last bits and as the batch falls.

    >>> credit(["a", "b", "a"], 2, np.array([-1.0, -2.0, -1.0]))
    50.0
    """
    texts = [choice.strip() for choice in choices]
    best = int(np.argmax(scores))
    shared = [i for i, text in enumerate(texts) if text == texts[best] or scores[i] == scores[best]]
    return 100.0 / len(shared) if gold in shared else 0.0


class Continuation(FileAbility):
    """Lines of context, which may be empty, and continuation."""

    kind = "continue"
    always = ("-nll",)

    @staticmethod
    def clean(record: dict[str, Any]) -> dict[str, Any]:
        return {"context": text_of(record, "context", empty=True), "continuation": text_of(record, "continuation")}

    @staticmethod
    def wording(fields: Mapping[str, Any]) -> Wording:
        return Wording(fields["context"], (fields["continuation"],))

    def right(self, fields: Mapping[str, Any]) -> tuple[str, str]:
        return fields["context"], fields["continuation"]

    def score(self, model: LanguageModel, tokenizer: Any, items: Sequence[Item], drawing: Drawing) -> list[Measurement]:
        """Minus the NLL per token."""
        pairs = [pair for item in items for pair in self.pairs(tokenizer, item, drawing)]
        return [per_token(model, pairs, tuple(item.key for item in items), drawing.batch_size)]


def per_token(model: LanguageModel, pairs: Sequence[Pair], keys: tuple[str, ...], batch_size: Rows) -> Measurement:
    """Minus the NLL per token: sum of log-probabilities over sum of tokens."""
    sums = continuation_logprobs(model, [c for c, _ in pairs], [[r] for _, r in pairs], batch_size=batch_size)
    statistics = np.array([[s[0], len(r)] for s, (_, r) in zip(sums, pairs, strict=True)], dtype=np.float64)
    return Measurement("-nll", "nats/token", statistics, "ratio", None, keys)
