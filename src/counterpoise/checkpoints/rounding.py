"""Rounding to a narrower floating-point type so that small updates survive: stochastic, and the same every time."""

from __future__ import annotations

import functools
import zlib

import numpy as np
import torch
from torch import Tensor

PERIOD = 1048573  # a prime just below 2^20: no row of a matrix meets the same numbers as the row below it
SAMPLE = 1024  # elements of a tensor that its key is made from
PIECE = 1 << 15  # elements worked on at once: 128 KiB stay in the cache; one thread takes them, waking no others
NARROW = {torch.bfloat16: (16, 1.0), torch.float16: (13, 2.0**-112)}
"""Of a float32's bits, how many the type lacks, and the power of two that maps its subnormals onto float32's."""


def narrow(wide: Tensor, dtype: torch.dtype, *, key: int, start: int = 0) -> Tensor:
    """`wide` in `dtype`; to bfloat16 and float16 each element is rounded up or down so that its expectation is kept.

    Rounding to the nearest loses what lies below half a unit in the last place, for every weight in the same direction:
    of two bfloat16 models that differ by one unit in most weights, an average at ratio 0.4 is the first and one at 0.6
    the second. Rounded up with the probability of the part that is cut off (Gupta et al. 2015, section 3), the errors
    cancel over the weights. Numbers that `dtype` holds stay as they are, and so do Inf and NaN. The pseudo-random numbers
    hang on `key` and on the element's place alone: cut into any stretches, on any machine, the bits are the same.

    Args:
        wide: float32 or wider.
        key: of the whole tensors that `wide` was made from, see `key_of`.
        start: where in the whole tensor (flattened) `wide` begins.

    >>> narrow(torch.full((4,), 1 + 1 / 256), torch.bfloat16, key=0)
    tensor([1.0078, 1.0000, 1.0078, 1.0000], dtype=torch.bfloat16)
    """
    if dtype not in NARROW:
        return wide.to(dtype)
    result = torch.empty(wide.shape, dtype=dtype)
    source, target = wide.reshape(-1), result.view(-1)
    buffer = torch.empty(min(PIECE, source.numel()), dtype=torch.float32)
    for begin in range(0, source.numel(), PIECE):
        part = target[begin : begin + PIECE]
        narrow_piece(buffer[: len(part)].copy_(source[begin : begin + PIECE]), part, key=key, start=start + begin)
    return result


def narrow_piece(wide: Tensor, out: Tensor, *, key: int, start: int) -> None:
    """`narrow` for a float32 piece of at most `piece(wide.device)` elements, which is spoiled: nothing is allocated."""
    lacking, scale = NARROW[out.dtype]
    first = (key + start) % PERIOD
    if scale != 1:
        wide.mul_(scale)
    noise = _noise(lacking, wide.device)[first : first + len(wide)]
    wide.view(torch.int32).add_(noise).bitwise_and_(-1 << lacking)
    if scale != 1:
        wide.div_(scale)
    out.copy_(wide)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """What arithmetic on these is done in: float32, or wider where one of them is."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def key_of(*tensors: Tensor) -> int:
    """A number for whole tensors by a sample of their contents: a head stored beside the embedding that it is tied to is
    rounded as that is, and an average of an average does not meet the random numbers of the first again."""
    found = 0
    for tensor in tensors:
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)].contiguous()
        found = zlib.crc32(sample.view(torch.uint8).cpu().numpy().tobytes(), found)
    return found


def piece(device: torch.device) -> int:
    """Elements worked on at once: on the CPU what stays in its cache, elsewhere as many as one call may round."""
    return PIECE if device.type == "cpu" else PERIOD


@functools.cache
def _noise(bits: int, device: torch.device) -> Tensor:
    """Uniform integers of so many bits, two periods of them, int32: drawn on the CPU wherever they are added."""
    drawn = np.random.Philox(key=0).random_raw(PERIOD // 4 + 1).view(np.uint16)[:PERIOD] >> (16 - bits)
    return torch.from_numpy(np.tile(drawn.astype(np.int32), 2)).to(device)
