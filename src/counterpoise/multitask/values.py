"""Numbers as tensors: on a loss's device, wide enough, summed up with weights; and as a checkpoint holds them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from numbers import Integral, Real
from operator import ge, gt, le, lt
from typing import Any

import torch
from torch import Tensor


def refuse_outside(interval: str, *, whole: bool = False, **settings: Any) -> None:
    """Raise for a setting that is no number of the interval.

    Examples:
        >>> refuse_outside("(0, inf)", eta=0.5, lr=0.1)
        >>> refuse_outside("[1, inf)", whole=True, warmup=1.5)
        Traceback (most recent call last):
        ValueError: warmup must be a whole number in [1, inf), found 1.5.
    """
    low, high = map(float, interval[1:-1].split(","))
    above, below = ge if interval[0] == "[" else gt, le if interval[-1] == "]" else lt
    for name, value in settings.items():
        is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
        if not (is_number and above(value, low) and below(value, high)):
            raise ValueError(f"{name} must be a {'whole ' * whole}number in {interval}, found {value!r}.")


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """The values in float64, or float32 on Apple's GPUs, which have nothing wider."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def wide(values: Tensor) -> Tensor:
    """The values in float32 at least: logarithms and weights near 1e-3 lose a digit in bfloat16."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def weighted_sum(weights_K: Tensor, values_K: Tensor, scale_K: Tensor | None) -> Tensor:
    """sum_i w_i scale_i l_i, in float32 at least."""
    values_K = wide(values_K)
    if scale_K is not None:
        weights_K = weights_K.to(scale_K) * scale_K
    if weights_K.dtype != values_K.dtype or weights_K.device != values_K.device:
        weights_K = weights_K.to(values_K.device, values_K.dtype, non_blocking=True)
    return torch.dot(weights_K, values_K)


def frozen(value: Any) -> Any:
    """A copy of what a method remembers, as a checkpoint holds it: numbers by task in float64."""
    if isinstance(value, torch.optim.Optimizer):
        return copy.deepcopy(value.state_dict())
    numbers = isinstance(value, list) and value and all(isinstance(x, float) for x in value)
    return torch.tensor(value, dtype=torch.float64) if numbers else copy.deepcopy(value)


def thawed(stored: Any, now: Any) -> Any:
    """What was remembered, in the form in which the method has it now; an optimiser, its settings
    and what it moves stay in place."""
    if isinstance(now, torch.optim.Optimizer):
        now.load_state_dict({"state": copy.deepcopy(stored["state"]), "param_groups": now.state_dict()["param_groups"]})
        return now
    if isinstance(now, Tensor) and isinstance(stored, Tensor) and now.shape == stored.shape:
        return now.copy_(stored)
    return stored.tolist() if isinstance(now, list) and isinstance(stored, Tensor) else copy.deepcopy(stored)
