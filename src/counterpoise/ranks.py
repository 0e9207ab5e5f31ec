"""The little that the weightings need to know about other processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_AVAILABLE = dist.is_available()


def world_size() -> int:
    """How many data-parallel processes there are: 1 unless `torch.distributed` is initialised."""
    return dist.get_world_size() if _AVAILABLE and dist.is_initialized() else 1


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Add the values of all ranks elementwise in float64; the same bits on every rank. One collective."""
    if world_size() == 1:
        return list(values)
    # nccl reduces only what is on a GPU; gloo and mpi take the host's memory.
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return [float(x) for x in total.tolist()]


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        means = tuple(g.clone(memory_format=torch.contiguous_format) for g in gradients)
        for mean in means:
            dist.all_reduce(mean)
            mean /= world_size()
        return means


def average_gradients(*parameters: Tensor) -> tuple[Tensor, ...]:
    """The parameters unchanged; their gradients averaged over the ranks, as DDP does for a model's own.

    Every rank must run the same backward passes. Averaging once more (by DDP, or by hand) changes nothing.
    """
    if world_size() == 1:
        return parameters
    averaged: tuple[Tensor, ...] = _Average.apply(*parameters)  # type: ignore[no-untyped-call]
    return averaged


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on every rank; where it fails there, all of them fail."""
    if world_size() == 1:
        return make()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = make()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return cast("T", found[0])
