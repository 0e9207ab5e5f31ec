"""Rounding to a narrower floating-point type so that small updates survive: stochastic, and the same every time.

For tensors, on any device; `bits` has the same for numpy arrays.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from counterpoise.checkpoints import bits
from counterpoise.checkpoints.bits import BFLOAT16, HALVES, PERIOD, PIECE, SAMPLE, Array, cut

NARROW = {getattr(torch, name): found for name, found in HALVES.items()}
library = torch


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
    result = torch.empty(wide.shape, dtype=dtype, device=wide.device)
    source, target = wide.reshape(-1), result.view(-1)
    size = piece(wide.device)
    buffer = torch.empty(min(size, source.numel()), dtype=torch.float32, device=wide.device)
    for begin in range(0, source.numel(), size):
        part = target[begin : begin + size]
        narrowed(widen(source[begin : begin + size], buffer), part, key=key, start=start + begin)
    return result


def narrowed(wide: Tensor, out: Tensor, *, key: int, start: int) -> None:
    """`narrow` of a piece of at most `piece(wide.device)` elements, which is spoiled, into `out`."""
    if out.dtype not in NARROW:
        out.copy_(wide)
        return
    wide = wide.to(torch.float32)
    lacking, scale = NARROW[out.dtype]
    first = (key + start) % PERIOD
    if scale != 1:
        wide *= scale
    cut(wide.view(torch.int32), _noise(lacking, wide.device)[first : first + len(wide)], lacking)
    if scale != 1:
        wide /= scale
    out.copy_(wide)


def piece(device: torch.device) -> int:
    """Elements worked on at once: on the CPU what stays in its cache, elsewhere as many as one call may round."""
    return PIECE if device.type == "cpu" else PERIOD


def floating(tensor: Tensor) -> bool:
    """Whether it holds numbers that have an update."""
    return tensor.is_floating_point()


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """What arithmetic on these is done in: float32, or wider where one of them is."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def wide(*tensors: Tensor) -> Tensor:
    """A buffer for a piece of these."""
    count = max(1, min(piece(tensors[0].device), tensors[0].numel()))
    return torch.empty(count, dtype=wide_dtype(*tensors), device=tensors[0].device)


def widen(tensor: Tensor, out: Tensor) -> Tensor:
    """A flat piece in the wider dtype of a buffer that is as long or longer; the part that was written."""
    return out[: len(tensor)].copy_(tensor)


def key_of(*tensors: Tensor) -> int:
    """A number for whole tensors by a sample of their contents: a head stored beside the embedding that it is tied to is
    rounded as that is, and an average of an average does not meet the random numbers of the first again."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    return bits.key_of(*(as_array(t[:: max(1, t.numel() // SAMPLE)].cpu()) for t in flat))


def as_tensor(array: Array) -> Tensor:
    """The tensor of a numpy array of `bits`, in the same memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == BFLOAT16 else tensor


def as_array(tensor: Tensor) -> Array:
    """The flat numpy array of a tensor, as `bits` has it, in the same memory where it is contiguous."""
    flat = tensor.reshape(-1)
    return (flat.view(torch.uint16) if tensor.dtype == torch.bfloat16 else flat).numpy()


@functools.cache
def _noise(lacking: int, device: torch.device) -> Tensor:
    """Drawn on the CPU wherever it is added."""
    return torch.from_numpy(bits.noise(lacking)).to(device)
