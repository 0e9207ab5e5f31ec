"""Generation: what a model answers, greedily, beside how likely it finds the reference."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from counterpoise.evaluation.items import FileAbility, Item, Pair, Wording, text_of
from counterpoise.evaluation.likelihood import per_token
from counterpoise.evaluation.measurement import Measurement
from counterpoise.language.engine import LanguageModel
from counterpoise.language.prompts import Prompt, encode_prompt
from counterpoise.language.sampling import Drawing, decode, sample
from counterpoise.statistics.bootstrap import Array

EXACT = "exact 2"
"""What exact match means, by version: part of the fingerprint."""
QUOTES = ('""', "''", "“”", "‘’", "„“", "«»")


class Generation(FileAbility):
    """Lines of prompt or messages, and reference; the metric beside its likelihood is exact match or BLEU."""

    kind = "generate"
    metrics = ("exact", "bleu")
    always = ("-nll",)
    draws = True

    @property
    def metric_id(self) -> str:
        """The metric with its version."""
        return EXACT if self.metric == "exact" else self.metric

    @staticmethod
    def clean(record: dict[str, Any]) -> dict[str, Any]:
        reference = text_of(record, "reference" if "reference" in record else "answer")
        if "messages" in record:
            messages = record["messages"]
            if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
                raise ValueError("messages: expected a list of {role, content}")
            if not all(isinstance(m.get(name), str) for m in messages for name in ("role", "content")):
                raise ValueError("messages: expected a text as role and as content of each")
            return {"messages": messages, "reference": reference}
        return {"prompt": text_of(record, "prompt" if "prompt" in record else "query"), "reference": reference}

    @staticmethod
    def wording(fields: Mapping[str, Any]) -> Wording:
        asked = fields["prompt"] if "prompt" in fields else "\n".join(m["content"] for m in fields["messages"])
        return Wording(asked, (fields["reference"],))

    def pairs(self, tokenizer: Any, item: Item, drawing: Drawing) -> list[Pair]:
        if "messages" not in item.fields:
            return super().pairs(tokenizer, item, drawing)
        messages = tuple((m["role"], m["content"]) for m in item.fields["messages"])
        context = encode_prompt(tokenizer, Prompt(messages, item.place), chat=drawing.chat)
        return [(context, tuple(tokenizer(item.fields["reference"], add_special_tokens=False)["input_ids"]))]

    def right(self, fields: Mapping[str, Any]) -> tuple[str, str]:
        """A prompt and its reference.

        Raises:
            ValueError: an item with messages.
        """
        if "prompt" not in fields:
            raise ValueError(f"{self.source}: calibration takes plain prompts, found an item with messages")
        return fields["prompt"], fields["reference"]

    def score(self, model: LanguageModel, tokenizer: Any, items: Sequence[Item], drawing: Drawing) -> list[Measurement]:
        """Minus the reference's NLL per token, and the metric of the greedy answers."""
        keys = tuple(item.key for item in items)
        pairs = [pair for item in items for pair in self.pairs(tokenizer, item, drawing)]
        likelihood = per_token(model, pairs, keys, drawing.batch_size)
        greedy = replace(drawing, n=1, temperature=0.0, seed=0)
        drawn = sample(model, tokenizer, [context for context, _ in pairs], greedy)
        answers = [
            text if "messages" in item.fields else text.split("\n")[0].strip()
            for text, item in zip(decode(tokenizer, [g[0] for g in drawn]), items, strict=True)
        ]
        references = [item.fields["reference"].strip() for item in items]
        if self.metric == "bleu":
            return [likelihood, Measurement("bleu", "BLEU", bleu(answers, references), "bleu", 0.0, keys)]
        return [likelihood, exact_match(answers, references, keys)]


def exact_match(answers: list[str], references: list[str], keys: tuple[str, ...]) -> Measurement:
    """Whether each answer is its reference, in percent; an empty one never is, as `_bare` empties no text."""
    hits = [100.0 * (_bare(a) == _bare(r)) for a, r in zip(answers, references, strict=True)]
    return Measurement("exact", "%", np.array(hits)[:, None], "mean", 0.0, keys)


def bleu(answers: Sequence[str], references: Sequence[str]) -> Array:
    """Sufficient statistics of corpus BLEU from sacrebleu, shape (sentences, 10); see `counterpoise.statistics.bootstrap`."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("BLEU needs sacrebleu; pip install 'counterpoise[eval]'") from error
    metric = BLEU()
    rows = []
    for answer, reference in zip(answers, references, strict=True):
        found = metric.corpus_score([answer], [[reference]])
        rows.append([found.sys_len, found.ref_len, *found.counts, *found.totals])
    return np.array(rows, dtype=np.float64)


def _bare(text: str) -> str:
    """NFC without case, repeated white space, quotes around, .,!? at the end and a leading article.

    SQuAD's normalisation drops all marks and articles, by which 3.5 is 35, -5 is 5 and the answer A is empty.

    >>> [_bare(text) for text in ("“The  Cat.”", "A", "-3.5", "?")]
    ['cat', 'a', '-3.5', '?']
    """
    bare, before = " ".join(unicodedata.normalize("NFC", text).casefold().split()), ""
    while bare != before:
        before, bare = bare, bare.rstrip(" .,!?") or bare
        if bare[:1] + bare[-1:] in QUOTES:
            bare = bare[1:-1].strip() or bare
    return re.sub(r"^(a|an|the) ", "", bare)
