"""Rewards that go wrong, importable from a command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

COUNT = {"breaks": 0, "fills": 0}
AT_SECOND: Callable[[], None] = lambda: None  # noqa: E731


def not_a_number(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """NaN in the end."""
    return [1.0] * (len(responses) - 1) + [float("nan")]


def one_short(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """One number too few."""
    return [1.0] * (len(responses) - 1)


def breaks(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Good until the call number BREAKS_AT of the environment."""
    COUNT["breaks"] += 1
    bad = COUNT["breaks"] == int(os.environ["BREAKS_AT"])
    return [float("nan") if bad else float(len(r)) for r in responses]


def fills(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Calls AT_SECOND at its second call."""
    COUNT["fills"] += 1
    if COUNT["fills"] == 2:
        AT_SECOND()
    return [float(len(r)) for r in responses]
