"""Which dtype to compute in: the stored one where the device has its arithmetic, float32 where it would imitate it."""

from __future__ import annotations

import timeit
from functools import cache
from typing import Any

import torch

from counterpoise.checkpoints.checkpoint import short
from counterpoise.checkpoints.files import first_line

SLOW = 2.0
"""A dtype whose matrix products take so many times float32's is imitated, not computed: arithmetic of its own takes about
half, and imitations were seen to take from 3.4 times on. Near a machine's own ratio two runs would choose otherwise."""


def computed_in(stored: torch.dtype, device: str | torch.device | None) -> torch.dtype:
    """`stored`, or float32 where the device would imitate it: every bfloat16 value is a float32 value, so nothing is lost.

    Args:
        device: where; None for one that is not here, of which nothing is known.

    >>> computed_in(torch.float64, "cpu")
    torch.float64
    """
    return torch.float32 if is_imitated(stored, device) else stored


def is_imitated(dtype: torch.dtype, device: str | torch.device | None) -> bool:
    """Whether matrices of `dtype` are multiplied many times slower than float32 ones: a CPU without bfloat16 arithmetic."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return narrow and device is not None and torch.device(device).type == "cpu" and slowdown(dtype) > SLOW


@cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times float32's a matrix product of `dtype` takes on this CPU; timed once, the best of five each."""
    return _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    a, b = (torch.ones(shape, dtype=dtype, device="cpu") for shape in ((64, 256), (256, 256)))
    with torch.autocast("cpu", enabled=False):
        return min(timeit.repeat(lambda: a @ b, number=1, repeat=6)[1:])  # the first one prepares


def warning(stored: torch.dtype, asked: torch.dtype | None, device: str | torch.device) -> str | None:
    """What a user should know who asked for a dtype, or left it to us, on a device that would imitate it."""
    dtype = asked or stored
    if not is_imitated(dtype, device):
        return None
    name = short(dtype)
    if asked is None:
        return f"this CPU has no {name} arithmetic: computed in float32, which is many times faster (--dtype {name} insists)"
    return f"this CPU has no {name} arithmetic and imitates it, many times slower than float32: choose that here"


def why_unusable(device: str) -> str | None:
    """What torch says of a device on which no tensor can be put here; None where one can."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        return first_line(error)
    return None


def placed(model: Any, device: str | torch.device) -> Any:
    """A loaded model on its device, ready to be asked; in float32 where its dtype would be imitated, else untouched."""
    model = model.to(device).eval()
    return model.float() if is_imitated(model.dtype, device) else model
