"""Weights cut up among processes (FSDP2): a block's are whole only while it is computed, by all processes in step.

Whoever runs such a model runs it in every process equally often; see `ranks.is_sharded`.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from counterpoise.ranks import ALONE, world_size

M = TypeVar("M", bound=nn.Module)


def cut_up(model: M, device: torch.device | str, policy: MixedPrecisionPolicy) -> M:
    """Cut `model` up in place, onto `device`: its blocks one by one, then what is left; returns it.

    Gradients are added up over the processes.

    Args:
        device: this process's; the model may still lie in the host's memory, no more than a block is moved at once.

    Raises:
        ValueError: a single process, a torch that cannot add gradients up.
    """
    if world_size() == 1:
        raise ValueError(ALONE)
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ValueError(f"shard: expected a newer torch (tested with 2.13), found {torch.__version__}; upgrade it")
    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for module in (*max(lists, key=len, default=()), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    for module in cut_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def cut_modules(model: nn.Module) -> list[FSDPModule]:
    """What of a model is cut up apart: its blocks, and the model for what is left."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def own_part(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that is cut up, sharing memory with it; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
