"""Items of a jsonl file that measure an ability, and the two halves of a text that is scored."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_args

from counterpoise.checkpoints.reading import json_lines
from counterpoise.evaluation.measurement import Measurement
from counterpoise.evaluation.parts import Part, clusters, in_part, placement
from counterpoise.evaluation.specs import fewest
from counterpoise.language.engine import LanguageModel
from counterpoise.language.groups import groups_of
from counterpoise.language.prompts import Prompt, begins, encode_prompt
from counterpoise.language.sampling import SCORING, Drawing
from counterpoise.records import digest


@dataclass(frozen=True)
class Item:
    """One item: its fields, the hash of their content, and the file and line where it stands.

    Attributes:
        group: see `groups_of`; it decides the part, or the content where the item is alone ("").
    """

    fields: Mapping[str, Any]
    place: str = field(default="", compare=False)
    group: str = field(default="", compare=False)

    @cached_property
    def key(self) -> str:
        """sha256 of the content."""
        return digest(self.fields)


Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a context and of what follows it."""


class Wording(NamedTuple):
    """What a model reads of an item: a context and what may follow it."""

    context: str
    continuations: tuple[str, ...]


@dataclass(frozen=True)
class FileAbility(ABC):
    """Items of one jsonl file under one kind of score; a kind is a subclass and a line of `abilities.KINDS`.

    Attributes:
        metric: of a kind that has several.
        limit: at most so many items per part.
        source: the spec, for messages.
        primary: the metric that counts, where it is not the first; all are measured and kept whichever it is.
    """

    kind: ClassVar[str]
    """What stands before the colon of its spec."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """What `metric` may be, its default first; empty for a kind that has one."""
    always: ClassVar[tuple[str, ...]]
    """What is measured whatever `metric` says, in the order of `score`."""
    draws: ClassVar[bool] = False
    """Whether an answer is drawn for every item."""

    name: str
    items: tuple[Item, ...]
    metric: str = "exact"
    limit: int | None = None
    source: str = ""
    primary: str | None = None

    @staticmethod
    @abstractmethod
    def clean(record: dict[str, Any]) -> dict[str, Any]:
        """The fields of an item from a line of the file.

        Raises:
            KeyError, ValueError: a field is missing or of another form.
        """

    @staticmethod
    @abstractmethod
    def wording(fields: Mapping[str, Any]) -> Wording:
        """What a model reads of an item: what a dry run counts the tokens of."""

    def pairs(self, tokenizer: Any, item: Item, drawing: Drawing) -> list[Pair]:
        """Token ids of an item's context before each of its continuations."""
        context, continuations = self.wording(item.fields)
        return [encode_pair(tokenizer, context, spaced(context, text)) for text in continuations]

    def questions(self, tokenizer: Any, part: Part, drawing: Drawing) -> list[tuple[int, ...]]:
        """Token ids of what the items of a part ask, without any answer; see `abilities.Ability.questions`."""
        first, found = begins(tokenizer), []
        for item in self.items_of(part, self.limit):
            messages = tuple((m["role"], m["content"]) for m in item.fields.get("messages", ()))
            plain = (("user", self.wording(item.fields).context),)
            ids = encode_prompt(tokenizer, Prompt(messages or plain, item.place), chat=drawing.chat and bool(messages))
            if ids or first is not None:  # else there is nothing to begin with
                found.append(ids or (first,))
        return found

    @abstractmethod
    def right(self, fields: Mapping[str, Any]) -> tuple[str, str]:
        """A context and its right answer: what a search may be calibrated on."""

    @abstractmethod
    def score(self, model: LanguageModel, tokenizer: Any, items: Sequence[Item], drawing: Drawing) -> list[Measurement]:
        """Measurements of some items, the likelihood first."""

    @property
    def fingerprint(self) -> str:
        """sha256 over kind, metric and items."""
        return digest([self.kind, self.metric_id, self.limit, *placement(self.items)])

    @property
    def metric_id(self) -> str:
        """The metric with its version."""
        return self.metric

    def items_of(self, part: Part, limit: int | None = None) -> list[Item]:
        """Items of a part in the order of their hash, so that a longer file changes few of the first `limit`.

        Raises:
            ValueError: no item is in that part.
        """
        chosen = in_part(self.items, part)[:limit]
        if not chosen:
            raise ValueError(
                f"{self.source}: expected items in the {part} part, found none among {len(self.items)}; "
                "give at least some twenty items"
            )
        return chosen

    def refuse_long(self, tokenizer: Any, drawing: Drawing, context: int | None, limit: int | None = None) -> None:
        """Raise where an item that `measure` takes, at most `limit` a part, does not fit a context of so many tokens.

        Raises:
            ValueError: the first such item and how many there are.
        """
        if context is None:
            return
        new, chosen = drawing.max_new_tokens if self.draws else 0, []
        for part in get_args(Part):
            chosen += in_part(self.items, part)[: fewest(limit, self.limit)]
        used, sizes = {item.key for item in chosen}, []
        for item in self.items:
            said = self.wording(item.fields)
            bytes_ = len(said.context.encode()) + max(len(text.encode()) for text in said.continuations)
            if item.key in used and ("messages" in item.fields or bytes_ + new > context // 2):  # else it fits surely
                pairs = self.pairs(tokenizer, item, drawing)
                sizes.append((item, max(len(a) + max(len(b), new) for a, b in pairs)))
        if long := [(item, size) for item, size in sizes if size > context]:
            raise ValueError(
                f"{self.name}: {long[0][0].place}: expected items of at most {context} tokens (the model's context"
                f"{f', {new} of them drawn' if new else ''}), found {long[0][1]} ({len(long)} of {len(used)} items are too "
                "long); shorten or drop them"
            )

    def measure(
        self, model: LanguageModel, tokenizer: Any, part: Part, drawing: Drawing = SCORING, *, limit: int | None = None
    ) -> list[Measurement]:
        """See `abilities.Ability.measure`; plain text unless an item has messages."""
        items = self.items_of(part, fewest(limit, self.limit))
        groups = clusters(items)
        return [replace(m, groups=groups) for m in self.score(model, tokenizer, items, drawing)]


def read_items(path: Path, clean: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Item]:
    items: dict[str, Item] = {}
    records: dict[str, dict[str, Any]] = {}
    for place, record in json_lines(path):
        try:
            item = Item(clean(record), place)
        except (ValueError, KeyError, TypeError) as error:
            said = f"expected the field {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{place}: {said}; found {json.dumps(record)[:80]}") from None
        items.setdefault(item.key, item)
        records.setdefault(item.key, record)
    if not items:
        raise ValueError(f"{path}: expected one json object a line, found an empty file")
    return [
        replace(item, group=group) for item, group in zip(items.values(), groups_of([*records.values()]), strict=True)
    ]


def text_of(record: dict[str, Any], name: str, *, empty: bool = False) -> str:
    """A field of a record; a KeyError where it is missing, a ValueError where it holds no text (or an `empty` one)."""
    value = record[name]
    if not isinstance(value, str) or not (value.strip() or empty):
        raise ValueError(f"{name}: expected a text, found {value!r}")
    return value


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Pair:
    """Token ids of a context and of what follows it, split where tokenising them together splits them.

    Context and continuation are tokenised as one text, as the model saw text in training; the border is where the
    context's own tokens end, or where the two part: a space at the context's end may begin the continuation's first word.
    An empty context is the tokenizer's BOS, or EOS.
    """
    whole = tokenizer(context + continuation)["input_ids"]
    start = tokenizer(context)["input_ids"] if context else []
    if not context:
        bos = begins(tokenizer)
        start, whole = [bos], whole if whole[:1] == [bos] else [bos, *whole]
    ends = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)} - {None}
    if start and len(start) > 1 and start[-1] in ends and whole[-1] == start[-1]:  # a tokenizer that closes every text
        start, whole = start[:-1], whole[:-1]
    common = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start))
    border = min(common, len(whole) - 1)
    return tuple(whole[:border]), tuple(whole[border:])


def spaced(context: str, continuation: str) -> str:
    """The continuation with one space before it, unless either side brings white space."""
    if not context or context[-1].isspace() or continuation[:1].isspace():
        return continuation
    return " " + continuation
