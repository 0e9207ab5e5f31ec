"""`mix`: the one place where two tensors become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np

from counterpoise.checkpoints import bits

if TYPE_CHECKING:
    from torch import Tensor

Donor = Literal["pre", "post"]
LARGEST = float(np.finfo(np.float32).max)
"""Of a ratio: the arithmetic is float32's."""
Seen = Callable[[Any, Any, Any, Any], None]
"""Takes a piece of PRE and of POST, and in their wide dtype PRE and PRE - POST."""
Values = TypeVar("Values", "Tensor", bits.Array)


def refuse_donor(donor: str | None) -> None:
    """Raise a ValueError for what is neither side."""
    if donor not in (None, *get_args(Donor)):
        raise ValueError(f"donor: expected {' or '.join(get_args(Donor))}, found {donor!r}")


def mix(
    pre: Values,
    post: Values,
    ratio: float,
    *,
    key: int | None = None,
    start: int = 0,
    out: Values | None = None,
    seen: Seen | None = None,
) -> Values:
    """theta(r) = pre + r (post - pre), in POST's dtype: Lin et al. 2024, section 5 (their weight is 1 - r).

    Computed in at least float32, as pre - r (pre - post), by operations that every processor rounds alike (`torch.lerp` fuses
    two of them on some), and rounded once, to bfloat16 and float16 stochastically: rounding to the nearest would turn an
    update of one unit in the last place into none or all of it (`rounding.narrow`). A ratio of 0 or 1 gives that
    side's very bytes, and so do elements that are equal in both; above 1 it extrapolates (ExPO). Integer tensors, which
    carry no update, are POST's.

    Args:
        pre, post: contiguous, of one shape: tensors on one device, or flat numpy arrays (bfloat16 as uint16, see `bits`);
            the bits are the same.
        key, start: for stretches, `key_of` the whole tensors and where in them (flattened) the stretch begins.
        out: written to and returned when given; contiguous, its dtype is POST's.
        seen: told of each piece before it is mixed; of nothing where nothing is computed.

    >>> import torch
    >>> mix(torch.zeros(2), torch.ones(2), 0.25)
    tensor([0.2500, 0.2500])
    """
    room: Any = bits if isinstance(post, np.ndarray) else _tensors()
    if ratio in (0, 1) or not room.floating(post):
        result = post if ratio or not room.floating(post) else _in_dtype_of(post, pre)
        if out is None:
            return result
        out[...] = result
        return out
    flat = [pre.reshape(-1), post.reshape(-1)]
    flat.append(room.library.empty_like(flat[1]) if out is None else out.reshape(-1))
    key = room.key_of(*flat[:2]) if key is None and post.dtype in room.NARROW else key or 0
    _mix(room, flat, float(ratio), key, start, seen)
    return flat[2].reshape(post.shape) if out is None else out


def _mix(room: Any, flat: Sequence[Any], ratio: float, key: int, start: int, seen: Seen | None) -> None:
    """Piece by piece in buffers that are allocated once: in fresh ones, page faults cost several times the arithmetic."""
    before, after = room.wide(*flat[:2]), room.wide(*flat[:2])
    for begin in range(0, len(flat[0]), len(before)):
        a, b, part = (values[begin : begin + len(before)] for values in flat)
        first, gap = room.widen(a, before), room.widen(b, after)
        room.library.subtract(first, gap, out=gap)  # so that -0.0 in both stays -0.0
        if seen is not None:
            seen(a, b, first, gap)
        gap *= ratio
        first -= gap
        room.narrowed(first, part, key=key, start=start + begin)


def _in_dtype_of(other: Any, values: Any) -> Any:
    """Rounded to the nearest, which numpy cannot for bfloat16."""
    if not isinstance(values, np.ndarray):
        return values.to(other.dtype)
    if values.dtype == other.dtype:
        return values
    room = _tensors()
    return room.as_array(room.as_tensor(values).to(room.as_tensor(other).dtype))


def _tensors() -> Any:
    from counterpoise.checkpoints import rounding

    return rounding
