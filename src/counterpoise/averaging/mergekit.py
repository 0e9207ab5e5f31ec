"""Recipes of mergekit 0.1.x (YAML): read as mergekit reads them, and what is not honoured refused by its name.

What it says of each tensor follows mergekit's own rules: settings of a model before those of its slice before those of the
whole, the first filter that is a part of the tensor's name, and a list as a gradient over the layers of a slice, whose first
value holds outside the layers (mergekit's config.py, plan.py and parameter_resolver.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from counterpoise.averaging.arithmetic import METHODS, Terms, kept_of, mixed
from counterpoise.averaging.mergekit_yaml import (
    Read,
    Settings,
    check_document,
    flag,
    graded,
    model_of,
    number,
    value_of,
)
from counterpoise.averaging.mix import LARGEST, Donor
from counterpoise.averaging.partition import Block, Partition, layerwise
from counterpoise.averaging.recipe import Recipe
from counterpoise.averaging.resident import main_dtype
from counterpoise.averaging.streaming import Mixed, of_tensors
from counterpoise.checkpoints.checkpoint import short
from counterpoise.checkpoints.matching import vocabulary
from counterpoise.checkpoints.preflight import Pair
from counterpoise.checkpoints.reading import read_text
from counterpoise.records import Stages


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of all models, and what is set for them; with `end` None all layers."""

    start: int
    end: int | None
    of_model: tuple[Settings, ...]
    of_all: Settings


@dataclass(frozen=True)
class Mergekit:
    """A merge as a YAML of mergekit says it.

    Attributes:
        document: the YAML, parsed.
        seed: of DARE's draw, which is another than mergekit's.

    Raises:
        ValueError: what mergekit would refuse or ignore, and what is not honoured here, by its name.
    """

    document: Settings
    seed: int = 0

    def __post_init__(self) -> None:
        check_document(self.document)
        models = self.models
        if len(models) < 2 or len(set(models)) < len(models):
            raise ValueError(f"models: expected two or more, each named once, found {', '.join(models)}")
        assert self.donor
        assert self.slices

    @classmethod
    def read(cls, path: str | Path) -> Mergekit:
        """Read a .yml or .yaml of mergekit."""
        try:
            document = yaml.safe_load(read_text(path))
        except (yaml.YAMLError, RecursionError) as error:
            line = getattr(getattr(error, "problem_mark", None), "line", None)
            place = path if line is None else f"{path}, line {line + 1}"
            raise ValueError(f"{place}: expected yaml, found {str(getattr(error, 'problem', error))[:80]}") from None
        try:
            return cls(document)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @cached_property
    def models(self) -> tuple[str, ...]:
        """PRE first: the base model, or for linear the first that is named."""
        named, base = [str(m) for m, _ in self._sources], self.base
        others = [m for m in named if m != base]
        return tuple(named) if self.method == "linear" else (str(base), *others)

    @property
    def method(self) -> str:
        """Of mergekit."""
        return str(self.document["merge_method"])

    @property
    def base(self) -> str | None:
        """The base model."""
        found = self.document.get("base_model")
        return None if found is None else model_of(found, "base_model")

    @property
    def donor(self) -> Donor:
        """Whose config and tokenizer are taken: the base model's, or those that `tokenizer_source` names."""
        held = self.document.get("tokenizer") or {}
        source = self.document.get("tokenizer_source") or (held.get("source") if isinstance(held, dict) else None)
        wanted = self.base if source in (None, "base") else source
        if wanted not in (None, *self.models[:2]):
            raise ValueError(
                f"{'base_model' if source is None else 'tokenizer_source'}: expected {self.models[0]} or {self.models[1]}, whose "
                f"config and tokenizer can be kept here, found {wanted!r}"
            )
        return "post" if wanted == self.models[1] else "pre"

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """The layers, cut as the YAML cuts them."""
        models = self.models
        if self.document.get("slices") is None:
            given = dict(self._sources)
            return (Slice(0, None, tuple(given.get(m, {}) for m in models), {}),)
        found: list[Slice] = []
        for place, piece in enumerate(self.document["slices"]):
            where = f"slices[{place}]"
            named = {model_of(s["model"], where): s for s in piece["sources"]}
            if set(named) != set(models):
                raise ValueError(f"{where}: expected all of {', '.join(models)}, found {', '.join(named)}")
            ranges = {tuple(s["layer_range"]) for s in named.values()}
            start, end = ranges.pop()
            if ranges or start != (found[-1].end if found else 0) or start >= end:
                raise ValueError(
                    f"{where}: layer_range: expected the next layers of every model, from {found[-1].end if found else 0} on; "
                    "models of another depth are not made here"
                )
            settings = tuple(named[m].get("parameters") or {} for m in models)
            found.append(Slice(start, end, settings, piece.get("parameters") or {}))
        return tuple(found)

    @property
    def _sources(self) -> list[tuple[str, Settings]]:
        """The models in the order in which they are named, each with its own settings."""
        listed = self.document.get("models") or self.document["slices"][0]["sources"]
        found = [(model_of(s["model"], "models"), s.get("parameters") or {}) for s in listed]
        there = self.base is None or self.base in dict(found)
        return found if there else [*found, (str(self.base), {})]

    def terms(self, names: Sequence[str]) -> dict[str, Terms]:
        """How each tensor is made.

        Raises:
            ValueError: a weight that is missing or no number, weights whose sum nothing can be divided by, a gradient over
                more than one stack of layers, slices that are not all layers, or differ where they must not.
        """
        deep = len(self.slices) > 1 or self.slices[0].end is not None or graded(self.document)
        cut = layerwise(names) if deep else None
        found = {name: self._outside(name) for name in (names if cut is None else cut.rest)}
        if cut is None:
            return found
        if any("," in b.name for b in cut.blocks) or any(re.search(r"\.\d+\.", n) for n in cut.rest):
            raise ValueError("gradients and slices: expected a model with one stack of layers, found several")
        if self.slices[-1].end not in (None, len(cut)):
            raise ValueError(f"slices: expected all {len(cut)} layers, found {self.slices[-1].end}")
        for layer, block in enumerate(cut.blocks):
            part = next(s for s in self.slices if s.end is None or layer < s.end)
            last = (len(cut) if part.end is None else part.end) - part.start - 1
            depth = (layer - part.start) / last if last else 1.0
            found |= {name: self._terms(part, name, depth) for name in block.tensors}
        return {name: found[name] for name in names}

    def _outside(self, name: str) -> Terms:
        first, last = (self._terms(part, name, 0.0) for part in (self.slices[0], self.slices[-1]))
        if first != last:
            raise ValueError(
                f"slices: expected the first and the last to say the same of {name}, which is in no layer; give that beside "
                "merge_method, and filters in the slices"
            )
        return first

    def _terms(self, part: Slice, name: str, depth: float) -> Terms:
        shared = (part.of_all, self.document.get("parameters") or {})
        how = METHODS[self.method]

        def of(option: str, read: Read, default: Any, model: int | None = None) -> Any:
            for settings in (*([] if model is None else [part.of_model[model]]), *shared):
                if option in settings and (value := value_of(settings[option], name, depth, option, read)) is not None:
                    return value
            if default is None:
                raise ValueError(f"{option}: expected one for {self.models[model or 0]}, found none for {name}")
            return default

        sides = range(0 if self.method == "linear" else 1, len(self.models))
        return Terms(
            tuple(of("weight", number, None, i) for i in sides),
            tuple(of("density", number, 1.0, i) if how.thins else 1.0 for i in sides),
            of("normalize", flag, how.normalize),
            of("lambda", number, 1.0) if self.method != "linear" else 1.0,
            bool(how.thins and of("rescale", flag, how.rescale)),
        ).checked(name, linear=self.method == "linear")

    def recipe(self, shapes: Mapping[str, Sequence[int]]) -> Recipe | None:
        """The same as ratios of `average`, where there is one POST and no element is left out; else None."""
        if len(self.models) != 2:
            return None
        ratios = {name: t.ratio(linear=self.method == "linear") for name, t in self.terms([*shapes]).items()}
        groups: dict[float, list[str]] = {}
        for name, ratio in ratios.items():
            if ratio is None or not 0 <= ratio <= LARGEST:
                return None
            groups.setdefault(ratio, []).append(name)
        sizes = {r: float(sum(math.prod(shapes[n]) for n in names)) for r, names in groups.items()}
        blocks = tuple(Block(f"ratio {r:g}", max(1.0, sizes[r]), tuple(names), ()) for r, names in groups.items())
        return Recipe(Partition(f"mergekit's {self.method}", blocks), tuple(groups))

    def check(self, pairs: Sequence[Pair]) -> None:
        """Refuse what can be seen only beside the checkpoints.

        Raises:
            ValueError: another number of POSTs, a dtype that is not POST's, vocabularies that mergekit would move or cut.
        """
        if len(pairs) != len(self.models) - 1:
            raise ValueError(
                f"the recipe merges {len(self.models) - 1} into {self.models[0]}, found {len(pairs)}; expected as many"
            )
        own, inner = short(main_dtype(pairs[0])), self.document.get("dtype")
        written = self.document.get("out_dtype") or inner or own
        if written != own or inner not in (None, "float32", own):
            raise ValueError(
                f"dtype: expected {own}, in which OUT is written as {pairs[0].post.source} is (computed in float32), found dtype "
                f"{inner} and out_dtype {self.document.get('out_dtype')}; leave them out, or give out_dtype: {own}"
            )
        if self.document.get("tokenizer_source") or self.document.get("tokenizer"):
            words = [vocabulary(c) for c in (pairs[0].pre, *(p.post for p in pairs))]
            if words[0].values() and (any(w != words[0] for w in words) or len(words[0]) != _rows(pairs[0])):
                raise ValueError(
                    "tokenizer_source: expected one vocabulary with as many tokens as the embedding has rows, found others: "
                    "mergekit would move or cut rows, which is not done here; leave it out"
                )

    def mixer(self, pairs: Sequence[Pair], progress: Stages | None) -> Mixed:
        """What becomes of each stretch."""
        names = pairs[0].names
        terms, linear = self.terms(names), self.method == "linear"
        elected = METHODS[self.method].elects
        keep = {}
        for done, name in enumerate(names, start=1):
            keep[name] = kept_of(pairs, name, terms[name], METHODS[self.method], self.seed)
            if progress is not None:
                progress("thinning the updates", done, len(names))
        return of_tensors(partial(mixed, terms, keep, elected, linear))

    def __str__(self) -> str:
        return f"mergekit's {self.method} of {len(self.models)} models, as `recipe.json` repeats it"


def is_yaml(path: str | Path) -> bool:
    """Whether a recipe's name says that it is mergekit's."""
    return Path(path).suffix.lower() in (".yml", ".yaml")


def _rows(pair: Pair) -> int:
    return int(pair.pre.config.get("vocab_size", -1))
