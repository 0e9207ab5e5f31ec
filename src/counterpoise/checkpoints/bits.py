"""The arithmetic of rounding for numpy arrays, and what it shares with `rounding`, which has the same for torch tensors.

A numpy array of uint16 is bfloat16 here: numpy has no type for it, and no checkpoint holds uint16. tests/test_bits.py compares
the bits of the two.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERIOD = 1048573  # a prime just below 2^20: no row of a matrix meets the same numbers as the row below it
SAMPLE = 1024  # elements of a tensor that its key is made from
PIECE = 1 << 15  # elements worked on at once: 128 KiB stay in the cache
HALVES = {"bfloat16": (16, 1.0), "float16": (13, 2.0**-112)}
"""Of a float32's bits, how many the type lacks, and the power of two that maps its subnormals onto float32's."""
BFLOAT16, EXPONENT = np.dtype(np.uint16), 0x7F80
NARROW = {BFLOAT16: HALVES["bfloat16"], np.dtype(np.float16): HALVES["float16"]}

Array = NDArray[Any]
library = np


def cut(words: Any, noise: Any, lacking: int) -> None:
    """Round float32 numbers, given as int32, so that `lacking` bits fall away: up with the probability of what is cut off."""
    words += noise
    words &= -1 << lacking


@functools.cache
def noise(lacking: int) -> Array:
    """Uniform integers of so many bits, two periods of them, int32."""
    found = np.random.Philox(key=0).random_raw(PERIOD // 4 + 1).view(np.uint16)[:PERIOD] >> (16 - lacking)
    return np.tile(found.astype(np.int32), 2)


def floating(array: Array) -> bool:
    """Whether it holds numbers that have an update."""
    return array.dtype.kind == "f" or array.dtype == BFLOAT16


def wide(*arrays: Array) -> Array:
    """A buffer for a piece of these, in what arithmetic on them is done in: float32, or wider where one of them is."""
    dtype = np.result_type(np.float32, *(a.dtype for a in arrays if a.dtype.kind == "f"))
    return np.empty(max(1, min(PIECE, len(arrays[0]))), dtype)


def widen(array: Array, out: Array) -> Array:
    """A flat piece in the wider dtype of a buffer that is as long or longer; the part that was written."""
    part = out[: len(array)]
    if array.dtype != BFLOAT16:
        part[:] = array
        return part
    words = part.view(np.uint32) if part.dtype == np.float32 else np.empty(len(array), np.uint32)
    words[:] = array
    words <<= 16
    if part.dtype != np.float32:
        part[:] = words.view(np.float32)
    return part


def narrowed(wide: Array, out: Array, *, key: int, start: int) -> None:
    """A piece, which is spoiled, in the dtype of `out`: see `rounding.narrow`."""
    if out.dtype not in NARROW:
        out[:] = wide
        return
    wide = wide.astype(np.float32, copy=False)
    lacking, scale = NARROW[out.dtype]
    first = (key + start) % PERIOD
    if scale != 1:
        wide *= scale
    words = wide.view(np.int32)
    cut(words, noise(lacking)[first : first + len(wide)], lacking)
    if out.dtype == BFLOAT16:
        words >>= 16
        out[:] = words
    else:
        wide /= scale
        out[:] = wide


def key_of(*arrays: Array) -> int:
    """`rounding.key_of` for flat arrays."""
    samples = (a[:: max(1, len(a) // SAMPLE)].tobytes() for a in arrays)
    return functools.reduce(lambda found, sample: zlib.crc32(sample, found), samples, 0)


def not_finite(array: Array) -> int:
    """How many elements are NaN or Inf."""
    if array.dtype == BFLOAT16:
        exponents = array & EXPONENT
        return int((exponents == EXPONENT).sum()) if exponents.size and exponents.max() == EXPONENT else 0
    return int((~np.isfinite(array)).sum()) if array.dtype.kind == "f" else 0
