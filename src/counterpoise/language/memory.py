"""How much memory a device has left, and what to do where it is not enough."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from counterpoise.language.ways import out_of_memory, remembered, warn_of
from counterpoise.ranks import in_step

R = TypeVar("R")
T = TypeVar("T")


def free_memory(device: str | torch.device) -> int | None:
    """Bytes that are free on a device that is here; None where nobody says.

    Of the host's memory what Linux calls available: pages of files that it can drop count as free.
    """
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    if torch.device(device).type != "cpu":
        return None
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    known = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {})
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None


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
