"""What is typed to name a reward, a preference or an ability, read here alone."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl

ABILITIES = "choices:, continue: or generate:FILE.jsonl, or the name of an lm-eval task"
"""What an ability may be, for messages."""


class RewardSpec(NamedTuple):
    """A reward as it is typed: `sentiment:FILE`, `module:function`, `FILE.py:function`, an endpoint's URL, or else a model.

    Attributes:
        head, tail: what stands before and after the colon.
    """

    kind: Literal["sentiment", "function", "endpoint", "model"]
    head: str
    tail: str

    @classmethod
    def read(cls, text: str) -> RewardSpec:
        """Tell them apart; nothing is opened or imported."""
        head, _, tail = text.partition(":")
        if head == "sentiment" and tail:
            return cls("sentiment", head, tail)
        if head in ("http", "https"):
            return cls("endpoint", head, tail)
        if ".py:" in text:
            return cls("function", *text.rpartition(":")[::2])
        function = tail and not Path(text).exists() and head.replace(".", "").replace("_", "").isalnum()
        return cls("function" if function else "model", head, tail)


def is_function(preference: str) -> bool:
    """Whether a preference is `module:function`, not the folder or hub id of a model."""
    return ":" in preference and not Path(preference).is_dir()


def imported(module: str, function: str) -> Any:
    """What `module`, a file or importable from the working folder, calls `function`; None where that is nothing to be called.

    A file's own imports are looked for beside it, too.
    """
    file = Path(module) if module.endswith(".py") else None
    sys.path.insert(0, place := str(file.resolve().parent) if file else "")
    try:
        found = getattr(_run(file) if file else importlib.import_module(module), function, None)
    finally:
        sys.path.remove(place)
    return found if callable(found) else None


def _run(file: Path) -> ModuleType:
    """The module of a file, known by its whole path, so that two files of one name are two modules."""
    name = str(file.resolve())
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec
    assert spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options_of(spec: str, known: Sequence[str]) -> dict[str, str]:
    """The options after an ability's `?`; a ValueError for one that is not `known`."""
    options = dict(parse_qsl(spec.partition("?")[2], keep_blank_values=True))
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{spec}: unknown option {unknown[0]!r}; expected {', '.join(known[:-1])} or {known[-1]}")
    return options


def limit_of(spec: str, options: Mapping[str, str]) -> int | None:
    """The option `limit`; a ValueError where it is no number above 0."""
    limit = options.get("limit")
    if limit is not None and not (limit.isdecimal() and int(limit) > 0):
        raise ValueError(f"{spec}: limit: expected a number above 0, found {limit!r}")
    return None if limit is None else int(limit)


def primary_of(spec: str, options: Mapping[str, str], metrics: Sequence[str]) -> str | None:
    """The option `primary`, as one of the `metrics` that there are; None where it is not given.

    A metric of which less is better is called by its name, with or without the minus of its negated score.

    Raises:
        ValueError: none of them.
    """
    if (wanted := options.get("primary")) is None:
        return None
    named = {bare(m): m for m in metrics}
    if bare(wanted) not in named:
        raise ValueError(f"{spec}: primary: expected {' or '.join(named) or 'nothing'}, found {wanted!r}")
    return named[bare(wanted)]


def bare(metric: str) -> str:
    """A metric's name without the minus that says it was negated."""
    return metric.removeprefix("-")


def fewest(*limits: int | None) -> int | None:
    """The smallest of the limits that are given; None where none is."""
    return min((n for n in limits if n is not None), default=None)
