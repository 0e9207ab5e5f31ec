"""How much memory a device has left, and what to do where it is not enough."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from counterpoise.language.ways import out_of_memory, remembered, warn_of
from counterpoise.ranks import from_first, in_step

R = TypeVar("R")
T = TypeVar("T")
Rows = int | Literal["auto"]
"""How many rows at once; "auto": as many as fit."""
MOST, USUAL, SHARE = 1024, 64, 0.8
"""Rows that "auto" takes at most, and those where nobody says how much memory there is; the share of it that they may fill."""


def free_memory(device: str | torch.device) -> int | None:
    """Bytes that are free on a device that is here; None where nobody says.

    Of the host's memory what Linux calls available: pages of files that it can drop count as free. Of a GPU's also what
    torch holds and does not use.
    """
    if (place := torch.device(device)).type == "cuda" and torch.cuda.is_available():
        unused = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return int(torch.cuda.mem_get_info(place)[0]) + unused
    if place.type != "cpu":
        return None
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    known = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {})
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None


def free_beside(model: nn.Module) -> int | None:
    """What is free on a model's device; of one that is cut up the first process's word counts, as all run it in step."""
    device = next(model.parameters()).device
    return from_first(lambda: free_memory(device)) if in_step(model) else free_memory(device)


def rows_that_fit(asked: Rows, need: Callable[[int], float], memory: float | None, least: int = 1) -> int:
    """The rows that were asked for, or half as many, half of that, ... until what they need fits: what a run comes to.

    Args:
        asked: "auto" begins with MOST, and leaves a share of the memory free.
        need: bytes of so many rows.
        memory: bytes; None where nobody knows, and then nothing is halved.
        least: fewer there are not, whatever they need.

    >>> rows_that_fit(48, lambda rows: 10 * rows, 200), rows_that_fit("auto", lambda rows: 10 * rows, 200)
    (12, 16)
    """
    rows = asked if asked != "auto" else MOST if memory is not None else USUAL
    room = math.inf if memory is None else SHARE * memory if asked == "auto" else memory
    while rows > least and need(rows) > room:
        rows //= 2
    return max(least, rows)


def as_fits(model: nn.Module, what: str, rows: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
    """What `work` gives for each of some rows: all together, or half of them at a time where there is no memory for that.

    How many fitted is remembered with the model, for each `what`; a warning says it.

    Raises:
        RuntimeError: there is no memory for one row, or for all of them with a model that is cut up among processes.
    """
    most, found = remembered(model, f"{what} at once", lambda _: list[int]()), list[R]()
    together = in_step(model)  # the other processes would not halve theirs
    while len(found) < len(rows):
        some = rows[len(found) : len(found) + (most[0] if most else len(rows))]
        try:
            found += work(some)
            continue
        except (RuntimeError, MemoryError) as error:
            if len(some) == 1 or together or not out_of_memory(error):
                raise
        most[:] = [len(some) // 2]  # after the error: what it held is free
        warn_of(model, f"{what}: no memory for {len(some)} at once, {most[0]} are taken")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found
