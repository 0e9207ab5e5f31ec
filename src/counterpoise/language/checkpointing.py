"""Gradients with less memory: layers keep their inputs alone, and are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from counterpoise.language.ways import asking, probes, remembered

M = TypeVar("M", bound=nn.Module)
ASKED = "_counterpoise_recomputes"
"""The attribute of a model whose training steps recompute."""


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Inside, a backward pass computes each layer again, by transformers' own gradient checkpointing (Chen et al. 2016).

    The gradient is the same, in about a third more time. transformers asks that layers are in training: here they alone are
    said to be, and not what lies in them, so that nothing is dropped.
    """
    switched: Any = model
    layers = _layers(model)
    before = [layer.training for layer in layers]
    if hasattr(switched, "activation_checkpointing_enable"):  # its name from transformers 5.2x on
        switched.activation_checkpointing_enable({"use_reentrant": False})
    else:
        switched.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.training = was
        switched._set_gradient_checkpointing(enable=False)


def recompute_steps(model: M) -> M:
    """Have every training step of a model compute its layers again; returns it.

    Raises:
        ValueError: its layers cannot be, or would give other numbers.
    """
    if not can_recompute(model):
        raise ValueError(
            f"{type(model).__name__}: expected layers that can be computed again (transformers' gradient checkpointing) "
            "with the same numbers, found none; leave --gradient-checkpointing out, or lower --micro-batch-size"
        )
    vars(model)[ASKED] = True
    return model


def as_asked(model: nn.Module) -> AbstractContextManager[None]:
    """`recomputed`, of a model of which `recompute_steps` was asked."""
    return recomputed(model) if getattr(model, ASKED, False) else nullcontext()


def can_recompute(model: nn.Module) -> bool:
    """Whether the layers of a model may be computed again, measured once: in training they give the same numbers."""
    return remembered(model, "recomputing", _measured)


def _measured(model: nn.Module) -> bool:
    layers = _layers(model)
    if not layers or not getattr(model, "supports_gradient_checkpointing", False):
        return False
    contexts, _ = probes(model)
    ids_BT = torch.tensor(contexts[:1], device=next(model.parameters()).device)
    with asking(model):
        plain = model(input_ids=ids_BT, use_cache=False).logits
        with recomputed(model):  # one that drops values in its own forward gives others
            return torch.equal(model(input_ids=ids_BT, use_cache=False).logits, plain)


def _layers(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
