"""Abilities: things PRE could do, with items that measure them.

Specs: `choices:FILE`, `continue:FILE`, `generate:FILE` (jsonl, may be gzipped; options after `?`, as in
`generate:fr-en.jsonl?primary=bleu&name=translation&limit=200`), or the name or folder of an lm-eval task, group or
tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from counterpoise.evaluation.generation import Generation
from counterpoise.evaluation.items import FileAbility, read_items
from counterpoise.evaluation.likelihood import Choices, Continuation
from counterpoise.evaluation.measurement import Measurement
from counterpoise.evaluation.parts import Part
from counterpoise.evaluation.specs import limit_of, options_of, primary_of
from counterpoise.language.engine import LanguageModel
from counterpoise.language.sampling import SCORING, Drawing

KINDS: dict[str, type[FileAbility]] = {kind.kind: kind for kind in (Choices, Continuation, Generation)}
"""What stands before the colon of a spec -> the class that reads and measures it."""


class Ability(Protocol):
    """What `Panel` asks of an ability."""

    @property
    def name(self) -> str:
        """What results call it."""

    @property
    def fingerprint(self) -> str:
        """sha256 over the items and the settings that decide the score."""

    @property
    def primary(self) -> str | None:
        """The metric that counts for the front and the pick; None for the first one that is measured."""

    def measure(
        self, model: LanguageModel, tokenizer: Any, part: Part, drawing: Drawing = SCORING, *, limit: int | None = None
    ) -> list[Measurement]:
        """Score `model` on one part by every metric, in the same order whichever is the primary one.

        Args:
            drawing: sequences at once, the longest answer and the chat template are taken from it.
            limit: at most so many items.
        """

    def questions(self, tokenizer: Any, part: Part, drawing: Drawing) -> list[tuple[int, ...]]:
        """Token ids of what the items of a part ask, as a model would read it before it answers."""


def load_abilities(specs: str | Sequence[str | Ability], *, trust_tasks: bool = False) -> list[Ability]:
    """Load every spec, or the one that is given, and leave what is loaded as it is; names are made unique by refusing repeats.

    Raises:
        ValueError: an unreadable file, a missing field, a choice out of range, two abilities of one name, a folder of lm-eval
            tasks that runs code and is not trusted to.
    """
    given = [specs] if isinstance(specs, str) else specs
    abilities = [_load(each, trust_tasks) if isinstance(each, str) else each for each in given]
    refuse_repeats([a.name for a in abilities])
    return abilities


def refuse_repeats(names: Sequence[str]) -> None:
    """Raise a ValueError where two abilities have one name."""
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"abilities: expected different names, found {repeated[0]!r} twice; name one with ?name=...")


def is_file(spec: str) -> bool:
    """Whether a spec is of a file, not of an lm-eval task."""
    kind, _, rest = spec.partition(":")
    return kind in KINDS and bool(rest)


def _load(spec: str, trust_tasks: bool) -> Ability:
    if not is_file(spec):
        from counterpoise.evaluation.harness_groups import load_task

        return load_task(spec, trusted=trust_tasks)
    name, _, path = spec.partition("?")[0].partition(":")
    kind = KINDS[name]
    options = options_of(spec, ("name", *(("metric",) if kind.metrics else ()), "limit", "primary"))
    asked = options.get("metric")
    if asked is not None and asked not in kind.metrics:
        raise ValueError(f"{spec}: metric: expected {' or '.join(kind.metrics)}, found {asked!r}")
    primary = primary_of(spec, options, (*kind.always, *(kind.metrics if asked is None else (asked,))))
    metric = asked or (primary if primary in kind.metrics else "exact")
    limit = limit_of(spec, options)
    title = options.get("name") or Path(path).name.removesuffix(".gz").removesuffix(".jsonl")
    items = tuple(read_items(Path(path), kind.clean))
    return kind(title, items, str(metric), limit, spec, None if primary == kind.always[0] else primary)
