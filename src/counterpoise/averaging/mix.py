"""`mix`: the one place where two tensors become one."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from counterpoise.checkpoints.rounding import NARROW, key_of, narrow_piece, piece, wide_dtype

Donor = Literal["pre", "post"]
LARGEST = torch.finfo(torch.float32).max
"""Of a ratio: the arithmetic is float32's."""


def refuse_donor(donor: str | None) -> None:
    """Raise a ValueError for what is neither side."""
    if donor not in (None, *get_args(Donor)):
        raise ValueError(f"donor: expected {' or '.join(get_args(Donor))}, found {donor!r}")


def mix(
    pre: Tensor, post: Tensor, ratio: float, *, key: int | None = None, start: int = 0, out: Tensor | None = None
) -> Tensor:
    """theta(r) = pre + r (post - pre), in POST's dtype: Lin et al. 2024, section 5 (their weight is 1 - r).

    Computed in at least float32, as pre - r (pre - post), by operations that every processor rounds alike (`torch.lerp` fuses
    two of them on some), and rounded once, to bfloat16 and float16 stochastically: rounding to the nearest would turn an
    update of one unit in the last place into none or all of it (`rounding.narrow`). A ratio of 0 or 1 gives that
    side's very bytes, and so do elements that are equal in both; above 1 it extrapolates (ExPO). Integer tensors, which
    carry no update, are POST's.

    Args:
        pre, post: contiguous tensors of one shape, on one device; the bits are the same on each.
        key, start: for stretches, `key_of` the whole tensors and where in them (flattened) the stretch begins.
        out: written to and returned when given; contiguous, its dtype is POST's.

    >>> mix(torch.zeros(2), torch.ones(2), 0.25)
    tensor([0.2500, 0.2500])
    """
    if ratio == 1 or not post.is_floating_point():
        result = post
    elif ratio == 0:
        result = pre.to(post.dtype)
    else:
        key = key_of(pre, post) if key is None and post.dtype in NARROW else key or 0
        result = torch.empty(post.shape, dtype=post.dtype, device=post.device) if out is None else out
        _mix(pre.reshape(-1), post.reshape(-1), ratio, key, start, result.view(-1))
        return result
    return result if out is None else out.copy_(result)


def _mix(pre: Tensor, post: Tensor, ratio: float, key: int, start: int, out: Tensor) -> None:
    """Piece by piece in buffers that are allocated once: in fresh ones, page faults cost several times the arithmetic."""
    size, wide = piece(post.device), wide_dtype(pre, post)
    before, after = (torch.empty(min(size, post.numel()), dtype=wide, device=post.device) for _ in range(2))
    for begin in range(0, post.numel(), size):
        a, b, part = (t[begin : begin + size] for t in (pre, post, out))
        first, gap = before[: len(part)].copy_(a), after[: len(part)].copy_(b)
        torch.sub(first, gap, out=gap)  # so that -0.0 in both stays -0.0
        mixed = first.sub_(gap.mul_(ratio))
        if part.dtype in NARROW:
            narrow_piece(mixed.to(torch.float32), part, key=key, start=start + begin)
        else:
            part.copy_(mixed)
