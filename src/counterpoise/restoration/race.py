"""A race: rewards on growing shares of the prompts, and abilities of those candidates alone that keep what is demanded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from counterpoise.evaluation.workbench import Piece, Point, Workbench
from counterpoise.search.candidates import Candidate
from counterpoise.statistics.demand import misses

LOOKS, LEVEL = (0.125, 0.25, 0.5), 0.05
"""Shares of the validation prompts after which candidates are dropped, and the level of the test (experiments/winning)."""
LEAST = 2
"""So many stay where nobody keeps the demand, those of most reward: the verdict says how near they came."""


def raced(
    bench: Workbench, candidates: Sequence[Candidate], pre: Point, post: Point, keep: float
) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """The candidates that may still be picked, and what each one cost.

    What is picked must keep the share `keep` of the reward gain on all validation prompts. So rewards come first: after each
    look those drop out that surely do not (paired t tests on the same prompts), after the last one those that do not.
    Controls, which are never picked, do not run. A race is a choice by rewards on validation data: intervals that no choice
    has touched are those of held-out data.

    Args:
        bench: its panel has looks.
        pre, post: measured on validation data.

    Returns:
        What is left, in the given order; for json of each candidate how many prompts it ran, whether its abilities are
        measured, and what it kept when it was last looked at, as a share of the gain on all prompts.
    """
    start = pre.scores.reward.statistics[:, 0]
    gain = post.scores.reward.statistics[:, 0] - start
    alive = [c for c in candidates if c.pickable]
    told: dict[str, dict[str, Any]] = {c.name: {"name": c.name, "method": c.method} for c in alive}
    for number, seen in enumerate(ends := bench.panel.looks_at(len(gain)), start=1):
        if bench.elsewhere is not None:
            bench.elsewhere([Piece(c.model, "validation", looks=number) for c in alive])
        works = [
            ({"what": "look", "number": number, "name": c.name}, partial(bench.rewards, c.model, "validation", number))
            for c in alive
        ]
        looks = bench.store.each(works)
        steps = np.stack([rewards - start[:seen] for rewards in looks], axis=1)
        out = misses(steps, gain[:seen], keep, LEVEL) if seen < ends[-1] else steps.mean(0) < keep * gain.mean()
        if out.all():
            out[np.argsort(-steps.mean(0), kind="stable")[:LEAST]] = False
        for c, moved in zip(alive, steps.mean(0), strict=True):
            told[c.name] |= {"prompts": seen, "kept": float(moved / gain.mean()), "abilities": False}
        alive = [c for c, gone in zip(alive, out, strict=True) if not gone]
    for c in alive:
        told[c.name]["abilities"] = True
    return alive, list(told.values())
