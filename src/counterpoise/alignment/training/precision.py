"""Mixed precision: float32 weights, computed with in bfloat16. What TRL and accelerate call bf16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
_inside: list[AbstractContextManager[Any]] = []


def compute_in_bfloat16(model: M) -> M:
    """Make every forward pass of `model` run under `torch.autocast` in bfloat16, copies of it included; returns it.

    Weights, gradients and the optimiser's state keep their dtype, so updates of any size add up; matrix products are
    done in bfloat16, whose logits are rounded to about three digits. Softmax and losses stay in float32.

    Raises:
        ValueError: weights of another dtype than float32.

    >>> _ = torch.manual_seed(0)
    >>> layer = compute_in_bfloat16(nn.Linear(4, 2))
    >>> layer(torch.ones(1, 4)).dtype, layer.weight.dtype
    (torch.bfloat16, torch.float32)
    """
    refuse_bf16_of(next(model.parameters()).dtype)
    model.register_forward_pre_hook(_enter)
    model.register_forward_hook(_leave, always_call=True)
    return model


def refuse_bf16_of(dtype: torch.dtype) -> None:
    """Raise a ValueError for weights that mixed precision is not for: other than float32."""
    if dtype != torch.float32:
        raise ValueError(
            f"bf16: expected float32 weights, found {str(dtype).removeprefix('torch.')}; give one of the two"
        )


@contextmanager
def weights_cast_once(model: nn.Module) -> Iterator[None]:
    """Inside, a model that computes in bfloat16 casts its weights once, not in every pass: they must not change.

    For passes without gradients. Autocast keeps what it cast of weights that take gradients, so frozen ones do meanwhile.
    """
    if _enter not in model._forward_pre_hooks.values():
        yield
        return
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        with _autocast(model):
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _autocast(model: nn.Module) -> AbstractContextManager[Any]:
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16)


def _enter(model: nn.Module, _: Any) -> None:
    context = _autocast(model)
    context.__enter__()
    _inside.append(context)


def _leave(model: nn.Module, *_: Any) -> None:
    _inside.pop().__exit__(None, None, None)
