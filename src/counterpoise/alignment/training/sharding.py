"""Weights cut up among the processes (FSDP2), and what the plain loops and the mitigations need to know of it.

Every process holds its rows of each parameter, of its gradient and of its moments; a block's weights are whole only while
the block is computed. On a model that is not cut up everything here does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from counterpoise.alignment.training import processes
from counterpoise.alignment.training.precision import M
from counterpoise.language.sharded import cut_modules, cut_up, own_part
from counterpoise.ranks import sum_over_ranks


def shard(model: M, device: torch.device | str, *, bf16: bool = False) -> M:
    """Cut `model` up in place, onto `device`: its blocks one by one, then what is left; returns it.

    Gradients are added up over the processes, as `processes.add_up_gradients` does for whole weights.

    Args:
        device: this process's; the model may still lie in the host's memory, no more than a block is moved at once.
        bf16: send and compute with bfloat16 copies. Coarser than `compute_in_bfloat16` alone: what passes from block to
            block and the norms are bfloat16 too.

    Raises:
        ValueError: a single process, a torch that cannot add gradients up.
    """
    processes.join(device)
    added_in = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    return cut_up(model, device, MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, added_in))


def part_like(full: Tensor, like: Tensor) -> Tensor:
    """The rows of `full` that this process holds of `like`, a view; all of it where `like` is whole."""
    if not isinstance(like, DTensor):
        return full
    parts = full.chunk(like.device_mesh.size())
    return parts[processes.rank()] if processes.rank() < len(parts) else full[:0]


def whole(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """`value` with every tensor in it whole: in the first process, on the host; None stands for it in the others.

    All processes call it together. A tensor that stands in two places is one afterwards too. Values that hold no tensor
    that is cut up are returned as they are.
    """
    seen = {} if seen is None else seen
    if isinstance(value, DTensor):
        if id(value) not in seen:
            full = value.full_tensor().detach()
            seen[id(value)] = full.cpu() if processes.is_first() else None
        return seen[id(value)]
    if isinstance(value, Mapping):
        return {name: whole(item, seen) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item, seen) for item in value)
    return value


def moments_like(state: dict[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """An optimiser's state dict of whole tensors, cut up as its parameters are."""

    def like(value: Any, parameter: nn.Parameter) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        own = part_like(value, parameter).to(own_part(parameter).device, copy=True).contiguous()
        mesh, placements = parameter.device_mesh, parameter.placements
        return DTensor.from_local(own, mesh, placements, shape=parameter.shape, stride=parameter.stride())

    moved = {
        i: {name: like(value, parameters[i]) for name, value in moments.items()}
        for i, moments in state["state"].items()
    }
    return {**state, "state": moved}


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights, so that each may run the model as often as it needs; they must not change."""
    modules = cut_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)


def clip_norm(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """Scale the gradients down where their norm, over all processes, is above `limit`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    cut = [g for g in gradients if isinstance(g, DTensor)]
    if not cut:
        torch.nn.utils.clip_grad_norm_(parameters, limit)
        return
    whole_ones = [g for g in gradients if not isinstance(g, DTensor)]
    square = sum_over_ranks([_square(cut)])[0] + _square(whole_ones)
    scale = limit / (square**0.5 + 1e-6)
    if not scale > 1:  # a norm that is not a number makes all gradients so, as torch does
        for gradient in gradients:
            own_part(gradient).mul_(scale)


def _square(tensors: Sequence[Tensor]) -> float:
    return float(sum(torch.linalg.vector_norm(own_part(t)).double() ** 2 for t in tensors))
