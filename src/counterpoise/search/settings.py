"""What a search is told, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

Search = Literal["hma", "two-sided", "both"]


def refuse_settings(means: Sequence[float], mean: float | None, keep_reward: float, proxy_size: int) -> None:
    """Said before the first hour of work, not after it."""
    if not means or not all(math.isfinite(m) and m >= 0 for m in means):
        raise ValueError(f"means: expected numbers of at least 0, found {list(means)}")
    for name, value in (("mean", mean), ("keep_reward", keep_reward)):
        if value is not None and not 0 <= value <= 1:  # NaN as well
            raise ValueError(f"{name}: expected a number from 0 to 1, found {value}")
    if proxy_size < 1:
        raise ValueError(f"proxy_size: expected at least 1 response, found {proxy_size}")


def refuse_search(search: str, mean: float | None, lambdas: Sequence[float]) -> None:
    """Likewise, of the kind of search and what it takes."""
    if search not in get_args(Search):
        raise ValueError(f"search: expected {', '.join(get_args(Search))}, found {search!r}")
    if search == "two-sided" and mean is not None:
        raise ValueError("mean: fixes HMA's mean ratio, and the two-sided search has none; use lambdas, or search both")
    if not lambdas or not all(math.isfinite(x) and x >= 0 for x in lambdas):
        raise ValueError(f"lambdas: expected numbers of at least 0, found {list(lambdas)}")
