"""Proxy, validation and held-out parts that never mix, by content hash."""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

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
