"""Abilities: things PRE could do, with items that measure them.

Specs: `choices:FILE`, `continue:FILE`, `generate:FILE` (jsonl, may be gzipped; options after `?`, as in
`generate:fr-en.jsonl?metric=bleu&name=translation&limit=200`), or the name or folder of an lm-eval task.
"""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

import numpy as np
from torch import nn

from counterpoise.evaluation.bleu import bleu
from counterpoise.evaluation.measurement import Measurement
from counterpoise.evaluation.parts import Part, part_of
from counterpoise.language.prompts import Prompt, encode_prompt
from counterpoise.language.sampling import decode, sample
from counterpoise.language.scoring import continuation_logprobs
from counterpoise.records import digest


class Ability(Protocol):
    """What `Panel` asks of an ability."""

    @property
    def name(self) -> str:
        """What results call it."""

    @property
    def fingerprint(self) -> str:
        """sha256 over the items and the settings that decide the score."""

    def measure(
        self,
        model: nn.Module,
        tokenizer: Any,
        part: Part,
        *,
        limit: int | None = None,
        batch_size: int = 16,
        seed: int = 0,
        max_new_tokens: int = 64,
        chat: bool = True,
    ) -> list[Measurement]:
        """Score `model` on one part; the first measurement is the primary one, used for the front and the pick."""


@dataclass(frozen=True)
class Item:
    """One item: its fields, and the hash of their content, which decides its part."""

    fields: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """sha256 of the content."""
        return digest(self.fields)


@dataclass(frozen=True)
class FileAbility:
    """Items of one jsonl file under one of the built-in scores.

    Attributes:
        kind: "choices", "continue" or "generate".
        metric: of `generate`, "exact" or "bleu".
        limit: at most so many items per part.
    """

    name: str
    kind: str
    items: tuple[Item, ...]
    metric: str = "exact"
    limit: int | None = None
    source: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over kind, metric and items."""
        metric = EXACT if (self.kind, self.metric) == ("generate", "exact") else self.metric
        return digest([self.kind, metric, self.limit, sorted(item.key for item in self.items)])

    def items_of(self, part: Part, limit: int | None = None) -> list[Item]:
        """Items of a part in the order of their hash, so that a longer file changes few of the first `limit`."""
        chosen = sorted((i for i in self.items if part_of(i.key) == part), key=lambda i: i.key)[:limit]
        if not chosen:
            raise ValueError(
                f"{self.source}: expected items in the {part} part, found none among {len(self.items)}; "
                "give at least some twenty items"
            )
        return chosen

    def measure(
        self,
        model: nn.Module,
        tokenizer: Any,
        part: Part,
        *,
        limit: int | None = None,
        batch_size: int = 16,
        seed: int = 0,
        max_new_tokens: int = 64,
        chat: bool = True,
    ) -> list[Measurement]:
        """See `Ability.measure`; plain text unless an item has messages."""
        items = self.items_of(part, min((n for n in (limit, self.limit) if n is not None), default=None))
        keys = tuple(item.key for item in items)
        if self.kind == "choices":
            return _choices(model, tokenizer, items, keys, batch_size)
        if self.kind == "continue":
            pairs = [
                encode_pair(tokenizer, i.fields["context"], _spaced(i.fields["context"], i.fields["continuation"]))
                for i in items
            ]
            return [_per_token(model, pairs, keys, batch_size)]
        return self._generated(model, tokenizer, items, keys, batch_size, max_new_tokens, chat)

    def _generated(
        self,
        model: nn.Module,
        tokenizer: Any,
        items: list[Item],
        keys: tuple[str, ...],
        batch_size: int,
        max_new_tokens: int,
        chat: bool,
    ) -> list[Measurement]:
        pairs = []
        for item in items:
            reference = item.fields["reference"]
            if "messages" in item.fields:
                messages = tuple((m["role"], m["content"]) for m in item.fields["messages"])
                context = encode_prompt(tokenizer, Prompt(messages), chat=chat)
                pairs.append((context, tuple(tokenizer(reference, add_special_tokens=False)["input_ids"])))
            else:
                pairs.append(encode_pair(tokenizer, item.fields["prompt"], _spaced(item.fields["prompt"], reference)))
        likelihood = _per_token(model, pairs, keys, batch_size)
        drawn = sample(
            model,
            tokenizer,
            [c for c, _ in pairs],
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            batch_size=batch_size,
        )
        plain = ["messages" not in item.fields for item in items]
        answers = [
            text.split("\n")[0].strip() if first_line else text
            for text, first_line in zip(decode(tokenizer, [g[0] for g in drawn]), plain, strict=True)
        ]
        references = [item.fields["reference"].strip() for item in items]
        return [likelihood, (_bleu if self.metric == "bleu" else _exact)(answers, references, keys)]


def load_abilities(specs: Sequence[str]) -> list[Ability]:
    """Load every spec; names are made unique by refusing repeats.

    Raises:
        ValueError: an unreadable file, a missing field, a choice out of range, two abilities of one name.
    """
    abilities = [_load(spec) for spec in specs]
    names = [a.name for a in abilities]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"abilities: expected different names, found {repeated[0]!r} twice; name one with ?name=...")
    return abilities


def _load(spec: str) -> Ability:
    kind, _, rest = spec.partition(":")
    if kind not in REQUIRED or not rest:
        from counterpoise.evaluation.harness import HarnessAbility

        return HarnessAbility.load(spec)
    path, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := sorted(set(options) - {"name", "metric", "limit"}):
        raise ValueError(f"{spec}: unknown option {unknown[0]!r}; expected name, metric or limit")
    metric = options.get("metric", "exact")
    if metric not in ("exact", "bleu"):
        raise ValueError(f"{spec}: metric: expected exact or bleu, found {metric!r}")
    limit = options.get("limit")
    if limit is not None and not (limit.isdecimal() and int(limit) > 0):
        raise ValueError(f"{spec}: limit: expected a number above 0, found {limit!r}")
    name = options.get("name") or Path(path).name.removesuffix(".gz").removesuffix(".jsonl")
    return FileAbility(
        name, kind, tuple(_read_items(Path(path), REQUIRED[kind])), metric, None if limit is None else int(limit), spec
    )


def _read_items(path: Path, clean: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Item]:
    items: dict[str, Item] = {}
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
                item = Item(clean(record))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {_explain(error)}; found {line.strip()[:80]!r}") from None
            items.setdefault(item.key, item)
    if not items:
        raise ValueError(f"{path}: expected one json object a line, found an empty file")
    return list(items.values())


def _explain(error: Exception) -> str:
    return f"expected the field {error}" if isinstance(error, KeyError) else str(error)


def _clean_choices(record: dict[str, Any]) -> dict[str, Any]:
    choices, gold = record["choices"], record["gold"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError("choices: expected a list of at least two texts")
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"gold: expected a number from 0 to {len(choices) - 1}, found {gold!r}")
    return {"query": _text(record, "query"), "choices": choices, "gold": gold}


def _clean_continue(record: dict[str, Any]) -> dict[str, Any]:
    return {"context": _text(record, "context", empty=True), "continuation": _text(record, "continuation")}


def _clean_generate(record: dict[str, Any]) -> dict[str, Any]:
    reference = _text(record, "reference" if "reference" in record else "answer")
    if "messages" in record:
        messages = record["messages"]
        if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
            raise ValueError("messages: expected a list of {role, content}")
        if not all(isinstance(m.get(name), str) for m in messages for name in ("role", "content")):
            raise ValueError("messages: expected a text as role and as content of each")
        return {"messages": messages, "reference": reference}
    return {"prompt": _text(record, "prompt" if "prompt" in record else "query"), "reference": reference}


def _text(record: dict[str, Any], name: str, *, empty: bool = False) -> str:
    value = record[name]
    if not isinstance(value, str) or not (value.strip() or empty):
        raise ValueError(f"{name}: expected a text, found {value!r}")
    return value


EXACT = "exact 2"
"""What exact match means, by version: part of the fingerprint of `generate`."""
QUOTES = ('""', "''", "“”", "‘’", "„“", "«»")
REQUIRED = {"choices": _clean_choices, "continue": _clean_continue, "generate": _clean_generate}


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a context and of what follows it, split where tokenising them together splits them.

    Context and continuation are tokenised as one text, as the model saw text in training; the border is where the
    context's own tokens end, or where the two part: a space at the context's end may begin the continuation's first word.
    An empty context is the tokenizer's BOS, or EOS.
    """
    whole = tokenizer(context + continuation)["input_ids"]
    start = tokenizer(context)["input_ids"] if context else []
    if not context:
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        start, whole = [bos], whole if whole[:1] == [bos] else [bos, *whole]
    ends = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)} - {None}
    if start and len(start) > 1 and start[-1] in ends and whole[-1] == start[-1]:  # a tokenizer that closes every text
        start, whole = start[:-1], whole[:-1]
    common = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start))
    border = min(common, len(whole) - 1)
    return tuple(whole[:border]), tuple(whole[border:])


def _spaced(context: str, continuation: str) -> str:
    """The continuation with one space before it, unless either side brings white space."""
    if not context or context[-1].isspace() or continuation[0].isspace():
        return continuation
    return " " + continuation


def _choices(
    model: nn.Module, tokenizer: Any, items: list[Item], keys: tuple[str, ...], batch_size: int
) -> list[Measurement]:
    """Log-probability of the gold choice per token, and accuracy by log-probability per character."""
    contexts, groups, lengths = [], [], []
    for item in items:
        query = item.fields["query"]
        pairs = [encode_pair(tokenizer, query, _spaced(query, choice)) for choice in item.fields["choices"]]
        border = min(len(c) for c, _ in pairs)  # one shared context, also where a choice changes its last token
        contexts.append(pairs[0][0][:border])
        groups.append([(*c[border:], *r) for c, r in pairs])
        lengths.append([len(choice.strip()) for choice in item.fields["choices"]])
    scores = continuation_logprobs(model, contexts, groups, batch_size=batch_size)
    gold = [item.fields["gold"] for item in items]
    logp = [s[g] / len(group[g]) for s, g, group in zip(scores, gold, groups, strict=True)]
    right = [100.0 * (int(np.argmax(np.divide(s, n))) == g) for s, n, g in zip(scores, lengths, gold, strict=True)]
    chance = 100 * float(np.mean([1 / len(item.fields["choices"]) for item in items]))
    return [
        Measurement("logprob", "nats/token", np.array(logp)[:, None], "mean", None, keys),
        Measurement("accuracy", "%", np.array(right)[:, None], "mean", chance, keys),
    ]


def _per_token(
    model: nn.Module, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]], keys: tuple[str, ...], batch_size: int
) -> Measurement:
    """Minus the NLL per token: sum of log-probabilities over sum of tokens."""
    sums = continuation_logprobs(model, [c for c, _ in pairs], [[r] for _, r in pairs], batch_size=batch_size)
    statistics = np.array([[s[0], len(r)] for s, (_, r) in zip(sums, pairs, strict=True)], dtype=np.float64)
    return Measurement("-nll", "nats/token", statistics, "ratio", None, keys)


def _exact(answers: list[str], references: list[str], keys: tuple[str, ...]) -> Measurement:
    """An empty answer is never right: no reference is empty, and `_bare` leaves something of every text."""
    hits = [100.0 * (_bare(a) == _bare(r)) for a, r in zip(answers, references, strict=True)]
    return Measurement("exact", "%", np.array(hits)[:, None], "mean", 0.0, keys)


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


def _bleu(answers: list[str], references: list[str], keys: tuple[str, ...]) -> Measurement:
    return Measurement("bleu", "BLEU", bleu(answers, references), "bleu", 0.0, keys)
