"""The ball of BanditMTL as a user says it: its centre, the prior, and its radius."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal

from counterpoise.multitask.losses import Counts
from counterpoise.multitask.mirror import ball_radius

Prior = Literal["uniform", "proportional", "sqrt"] | float | Counts
"""The centre of the ball: by name, by the temperature T of share^(1/T), or a number per task."""

FLOOR = 1e-9
"""The prior, relative to uniform, of a task that was never seen."""

_TEMPERATURES = {"uniform": math.inf, "proportional": 1.0, "sqrt": 2.0}


def temperature(prior: str | float) -> float:
    """The T of a prior share^(1/T), from its name or itself."""
    found = _TEMPERATURES.get(prior, math.nan) if isinstance(prior, str) else float(prior)
    if prior is True or not found > 0.0:
        raise ValueError(
            f'prior must be "uniform", "proportional", "sqrt", a temperature above 0 or a number per task, '
            f"found {prior!r}."
        )
    return found


def powers(shares: Sequence[float], temperature: float) -> list[float]:
    """share^(1/T) over its mean."""
    largest = max(shares)  # taken off first: at a small temperature all would end as 0
    raised = [(x / largest) ** (1.0 / temperature) for x in shares]
    mean = sum(raised) / len(raised)
    return [max(x / mean, FLOOR) for x in raised]


def largest_radius(prior: Sequence[float], total: float) -> float:
    """log(1 / min prior), the radius from which on the ball holds every weighting."""
    return math.log(total / min(prior))


def part_of_the_largest(rho: str) -> float:
    try:
        part = float(rho.removesuffix("%")) / 100.0 if rho.endswith("%") else math.nan
    except ValueError:
        part = math.nan
    if not 0.0 <= part < 1.0:
        raise ValueError(
            f'rho must be a number or a share of log(1 / min prior) below 100 %, such as "30%", found {rho!r}.'
        )
    return part


def ball_of(
    m: int, rho: float | str | None, min_effective_tasks: float | None, prior: list[float] | None, uniform: bool
) -> float:
    if (rho is None) == (min_effective_tasks is None):
        raise ValueError(
            f"expected exactly one of rho and min_effective_tasks, found rho={rho} and "
            f"min_effective_tasks={min_effective_tasks}. rho = log({m} / min_effective_tasks)."
        )
    if min_effective_tasks is not None and not uniform:
        raise ValueError(
            "min_effective_tasks counts from the uniform prior: with another one say rho, or its share of the largest "
            'radius, rho="30%".'
        )
    largest = largest_radius(prior or [1.0] * m, sum(prior or [1.0] * m))
    if isinstance(rho, str):
        return part_of_the_largest(rho) * largest
    radius = ball_radius(m, min_effective_tasks) if min_effective_tasks is not None else float(rho or 0.0)
    if not radius >= 0.0:
        raise ValueError(f"rho must be >= 0, found {rho}: 0 keeps the weights at the prior.")
    if prior and radius >= largest:
        warnings.warn(
            f"rho = {radius:.4g} >= log(1 / min prior) = {largest:.4g}: the ball holds every weighting, and what is left "
            f"is Group DRO's update, which may put all weight on one task. Choose a smaller rho (or min_effective_tasks "
            f"> 1), or GroupDRO if you meant that.",
            stacklevel=3,
        )
    return radius


def simplex(m: int, probabilities: Sequence[float]) -> list[float]:
    values = [float(x) for x in probabilities]
    if len(values) != m or min(values) < 0.0 or abs(sum(values) - 1.0) > 1e-6:
        raise ValueError(f"drawn_by must hold {m} probabilities that add up to 1, one per task, found {values}.")
    if 0.0 in values:
        raise ValueError(
            f"drawn_by is 0 for task {values.index(0.0)}, found {values}: expected every probability above 0, since "
            f"losses are divided by it. Leave out a task that is never drawn."
        )
    return values
