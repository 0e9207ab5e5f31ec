"""Choices and continuations: how likely a model finds answers and texts that are given; nothing is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from counterpoise.evaluation.items import FileAbility, Item, Wording, encode_pair, spaced, text_of
from counterpoise.evaluation.measurement import Measurement
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import continuation_logprobs


class Choices(FileAbility):
    """Lines of query, choices and gold, the number of the right one."""

    kind = "choices"

    @staticmethod
    def clean(record: dict[str, Any]) -> dict[str, Any]:
        choices, gold = record["choices"], record["gold"]
        texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
        if not texts or len(choices) < 2:
            raise ValueError("choices: expected a list of at least two texts")
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise ValueError(f"gold: expected a number from 0 to {len(choices) - 1}, found {gold!r}")
        return {"query": text_of(record, "query"), "choices": choices, "gold": gold}

    @staticmethod
    def wording(fields: Mapping[str, Any]) -> Wording:
        return Wording(fields["query"], tuple(fields["choices"]))

    def right(self, fields: Mapping[str, Any]) -> tuple[str, str]:
        return fields["query"], fields["choices"][fields["gold"]]

    def score(self, model: nn.Module, tokenizer: Any, items: Sequence[Item], drawing: Drawing) -> list[Measurement]:
        """Log-probability of the gold choice per token, and accuracy by log-probability per character."""
        contexts, groups, lengths = [], [], []
        for item in items:
            query = item.fields["query"]
            pairs = [encode_pair(tokenizer, query, spaced(query, choice)) for choice in item.fields["choices"]]
            border = min(len(c) for c, _ in pairs)  # one shared context, also where a choice changes its last token
            contexts.append(pairs[0][0][:border])
            groups.append([(*c[border:], *r) for c, r in pairs])
            lengths.append([len(choice.strip()) for choice in item.fields["choices"]])
        scores = continuation_logprobs(model, contexts, groups, batch_size=drawing.batch_size)
        gold = [item.fields["gold"] for item in items]
        logp = [s[g] / len(group[g]) for s, g, group in zip(scores, gold, groups, strict=True)]
        hits = [100.0 * (int(np.argmax(np.divide(s, n))) == g) for s, n, g in zip(scores, lengths, gold, strict=True)]
        chance = 100 * float(np.mean([1 / len(item.fields["choices"]) for item in items]))
        keys = tuple(item.key for item in items)
        return [
            Measurement("logprob", "nats/token", np.array(logp)[:, None], "mean", None, keys),
            Measurement("accuracy", "%", np.array(hits)[:, None], "mean", chance, keys),
        ]


class Continuation(FileAbility):
    """Lines of context, which may be empty, and continuation."""

    kind = "continue"

    @staticmethod
    def clean(record: dict[str, Any]) -> dict[str, Any]:
        return {"context": text_of(record, "context", empty=True), "continuation": text_of(record, "continuation")}

    @staticmethod
    def wording(fields: Mapping[str, Any]) -> Wording:
        return Wording(fields["context"], (fields["continuation"],))

    def right(self, fields: Mapping[str, Any]) -> tuple[str, str]:
        return fields["context"], fields["continuation"]

    def score(self, model: nn.Module, tokenizer: Any, items: Sequence[Item], drawing: Drawing) -> list[Measurement]:
        """Minus the NLL per token."""
        texts = [(i.fields["context"], i.fields["continuation"]) for i in items]
        pairs = [encode_pair(tokenizer, context, spaced(context, text)) for context, text in texts]
        return [per_token(model, pairs, tuple(item.key for item in items), drawing.batch_size)]


def per_token(
    model: nn.Module, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]], keys: tuple[str, ...], batch_size: int
) -> Measurement:
    """Minus the NLL per token: sum of log-probabilities over sum of tokens."""
    sums = continuation_logprobs(model, [c for c, _ in pairs], [[r] for _, r in pairs], batch_size=batch_size)
    statistics = np.array([[s[0], len(r)] for s, (_, r) in zip(sums, pairs, strict=True)], dtype=np.float64)
    return Measurement("-nll", "nats/token", statistics, "ratio", None, keys)
