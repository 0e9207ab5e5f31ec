"""Weights cut up among processes (FSDP2): a block's are whole only while it is computed, by all processes in step.

Whoever runs such a model runs it in every process equally often. Drawing and scoring therefore do the same rows in all of
them; the gradient of a search does other rows in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from counterpoise.language.scoring import Example, row_nlls
from counterpoise.ranks import ALONE, shared, turn, world_size

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


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


def is_sharded(model: object) -> bool:
    """Whether `cut_up` was here."""
    return isinstance(model, FSDPModule)


def own_part(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that is cut up, sharing memory with it; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_unless_sharded(model: nn.Module, count: int, work: Callable[[int], T]) -> list[T]:
    """`ranks.shared`; of a model that is cut up every process does all, in step: `work` shares what it can itself."""
    return [work(n) for n in range(count)] if is_sharded(model) else shared(count, work)


def nlls(model: nn.Module, examples: Sequence[Example], *, temperature: float = 1.0) -> Tensor:
    """`row_nlls`; of a model that is cut up each process runs its share of the rows, and all know all numbers.

    There a process has the gradient of its own rows alone: FSDP adds them up. One that has none keeps the others company.
    """
    if not is_sharded(model):
        return row_nlls(model, examples, temperature=temperature)
    rank, world = turn()
    own = list(range(rank, len(examples), world))
    found_B = row_nlls(model, [examples[i] for i in own or [-1]], temperature=temperature)
    all_B, places_B = found_B.new_zeros(len(examples)), torch.tensor(own, dtype=torch.long, device=found_B.device)
    all_B[places_B] = found_B.detach()[: len(own)]
    dist.all_reduce(all_B)
    return all_B.index_copy(0, places_B, found_B) if own else all_B + 0 * found_B.sum()
