"""How far POST moved from PRE, per block and per kind of module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from counterpoise.averaging.partition import OUTSIDE, by_module, partition
from counterpoise.checkpoints.preflight import Scan, preflight, scan


@dataclass(frozen=True)
class Change:
    """One part of the model: |post - pre| / |pre|, and the share of its elements that differ at all.

    In bfloat16 a small share that differs says that most of the update was lost in rounding.
    """

    kind: str
    name: str
    parameters: int
    change: float
    changed: float


def diff(
    pre: str | Path,
    post: str | Path,
    *,
    blocks: int | str = 3,
    drop: Sequence[str] = (),
    allow_unrelated: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Change], list[str]]:
    """Read both checkpoints once and compare them; returns the rows and the warnings of the preflight."""
    pair = preflight(pre, post, drop=drop)
    scanned, warnings = scan(pair, allow_unrelated=allow_unrelated, count_changed=True, progress=progress)
    parts = [("all", "the whole model", pair.names)]
    for kind, cut in (("block", partition(pair.shapes, blocks)), ("module", by_module(pair.shapes))):
        parts += [(kind, b.name, b.tensors) for b in cut.blocks]
        if cut.rest and cut.name != "by module":
            parts.append((kind, OUTSIDE, cut.rest))
    return [_row(kind, name, tensors, scanned) for kind, name, tensors in parts], [*pair.warnings, *warnings]


def _row(kind: str, name: str, tensors: Sequence[str], scanned: Scan) -> Change:
    update, size = (math.fsum(sums.get(t, 0.0) for t in tensors) for sums in (scanned.update, scanned.size))
    elements = sum(math.prod(scanned.pair.post.shape(t)) for t in tensors if t in scanned.size)
    changed = sum(scanned.changed.get(t, 0) for t in tensors)
    change = math.sqrt(update / size) if size else 0.0
    return Change(kind, name, elements, change, changed / elements if elements else 0.0)
