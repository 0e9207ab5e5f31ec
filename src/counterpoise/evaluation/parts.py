"""Proxy, validation and held-out parts that never mix, by content hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

T = TypeVar("T")
Part = Literal["proxy", "validation", "held-out"]
PARTS: tuple[Part, ...] = get_args(Part)


def part_of(content: str) -> Part:
    """The part that `content` belongs to: 40 % proxy, 30 % validation, 30 % held-out.

    It depends on the content alone: reordering, extending or merging files moves nothing from one part to another, and
    an item that stands in two files is in the same part of both.

    >>> part_of("Describe a process of making crepes.")
    'proxy'
    """
    share = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2**64
    return "proxy" if share < 0.4 else "validation" if share < 0.7 else "held-out"


def in_part(things: Sequence[T], part: Part) -> list[T]:
    """Items or prompts of a part, in the order of their keys: by their group where they share one, else by their own content."""
    found: list[Any] = [thing for thing in things if part_of(_of(thing)) == part]
    return sorted(found, key=lambda thing: thing.key)


def clusters(things: Sequence[Any]) -> tuple[str, ...]:
    """The group of each, its own key where it is alone; () where no two are together."""
    found = tuple(map(_of, things))
    return found if len(set(found)) < len(found) else ()


def placement(things: Sequence[Any]) -> list[Any]:
    """What decides which are measured together, for a fingerprint: the keys, and the groups where there are some."""
    return [
        sorted(t.key for t in things),
        *([sorted([t.group, t.key] for t in things if t.group)] * any(t.group for t in things)),
    ]


def _of(thing: Any) -> str:
    return str(thing.group or thing.key)
