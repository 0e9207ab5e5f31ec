"""How much memory a device has left."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch


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
