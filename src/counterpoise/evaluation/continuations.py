"""Continuations: how likely a model finds the text that follows a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from counterpoise.evaluation.items import FileAbility, Item, Wording, encode_pair, spaced, text_of
from counterpoise.evaluation.measurement import Measurement
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import continuation_logprobs


class Continuation(FileAbility):
    """Lines of context, which may be empty, and continuation."""

    kind = "continue"

    @staticmethod
    def clean(record: dict[str, Any]) -> dict[str, Any]:
        """See `FileAbility.clean`."""
        return {"context": text_of(record, "context", empty=True), "continuation": text_of(record, "continuation")}

    @staticmethod
    def wording(fields: Mapping[str, Any]) -> Wording:
        """The context and its one continuation."""
        return Wording(fields["context"], (fields["continuation"],))

    def right(self, fields: Mapping[str, Any]) -> tuple[str, str]:
        """The context and its continuation."""
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
