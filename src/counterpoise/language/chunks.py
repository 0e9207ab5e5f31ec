"""Log-probabilities of tokens from logits, some at a time: of the vocabulary's size no other copy is held in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 22
"""Numbers of the vocabulary's size that are worked on at once, in float32 or wider."""


def widened(values: Tensor) -> Tensor:
    """In float32 or wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def spans(mask_BC: Tensor, words: int) -> Iterator[tuple[int, slice]]:
    """Row by row where tokens stand, which in a row is in one piece: CHUNK logits at a time, each of `words` to a token."""
    step = max(1, CHUNK // words)
    for row, (first, count) in enumerate(zip(mask_BC.int().argmax(1).tolist(), mask_BC.sum(1).tolist(), strict=True)):
        for start in range(first, first + count, step):
            yield row, slice(start, min(start + step, first + count))


def token_logprobs(logits_BCV: Tensor, targets_BC: Tensor, mask_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(token) in nats at a temperature, (B, C), float32 or wider, differentiable once; 0 on padding.

    The backward pass computes the softmax again: beside logits and their gradient, both in the logits' own dtype, CHUNK
    numbers at a time are in memory.
    """
    found: Tensor = _TokenLogprobs.apply(logits_BCV, targets_BC, mask_BC, temperature)  # type: ignore[no-untyped-call]
    return found


class _TokenLogprobs(torch.autograd.Function):
    """See `token_logprobs`."""

    @staticmethod
    def forward(ctx: Any, logits_BCV: Tensor, targets_BC: Tensor, mask_BC: Tensor, temperature: float) -> Tensor:
        """Saves what it was given."""
        ctx.save_for_backward(logits_BCV, targets_BC, mask_BC)
        ctx.save_for_forward(logits_BCV, targets_BC, mask_BC)
        ctx.temperature = temperature
        found_BC = widened(logits_BCV.new_zeros(mask_BC.shape))
        for at in spans(mask_BC, logits_BCV.shape[-1]):
            found_BC[at] = _picked(logits_BCV[at], targets_BC[at], temperature)
        return found_BC

    @staticmethod
    def jvp(ctx: Any, tangent_BCV: Tensor, *_: None) -> Tensor:
        """The derivative along a direction of the logits, for forward-mode differentiation."""
        logits_BCV, targets_BC, mask_BC = ctx.saved_tensors
        found_BC = widened(logits_BCV.new_zeros(mask_BC.shape))
        for at in spans(mask_BC, logits_BCV.shape[-1]):
            moved_NV = widened(tangent_BCV[at]) / ctx.temperature
            mean_N = (torch.softmax(widened(logits_BCV[at]) / ctx.temperature, dim=-1) * moved_NV).sum(1)
            found_BC[at] = moved_NV.gather(1, targets_BC[at][:, None])[:, 0] - mean_N
        return found_BC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_BC: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient by the logits."""
        logits_BCV, targets_BC, mask_BC = ctx.saved_tensors
        gradient_BCV = torch.zeros_like(logits_BCV)
        for at in spans(mask_BC, logits_BCV.shape[-1]):
            own_NV = logits_BCV[at].detach().requires_grad_(True)
            with torch.enable_grad():
                found_N = _picked(own_NV, targets_BC[at], ctx.temperature)
            [gradient_BCV[at]] = torch.autograd.grad(found_N, own_NV, slope_BC[at])
        return gradient_BCV, None, None, None


def _picked(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(widened(logits_NV) / temperature, dim=-1).gather(1, targets_N[:, None])[:, 0]
