"""The little that weightings, drawing and searches need to know about other processes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
_AVAILABLE = dist.is_available()
ALONE = "shard: expected several processes, found one; start it with torchrun --nproc-per-node N"


class NoNumbers(ValueError):
    """A model gives NaN or infinity."""


TOLD = (NoNumbers, ValueError, OSError, ModuleNotFoundError)
"""Errors that a user can act on: their message alone is passed on, of any other its traceback."""


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


def turn() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), world_size()) if world_size() > 1 else (0, 1)


def gathered(work: Callable[[], T]) -> list[T]:
    """What `work` returns in each process, in their order, known to all.

    Raises:
        Exception: `work` failed in one process; then it is raised in all, and none waits for another.
    """
    if world_size() == 1:
        return [work()]
    value, failure, told = cast("Any", (None, None, None))
    try:
        value = work()
    except Exception as error:
        failure, lines = error, [*traceback.format_exception_only(error), *traceback.format_exception(error)]
        told = RuntimeError, f"process {dist.get_rank()} failed: {''.join(lines)}"
        if kinds := [kind for kind in TOLD if isinstance(error, kind)]:
            told = kinds[0], str(error)
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, (value, told))
    failure = failure or next((kind(message) for kind, message in (other for _, other in found if other)), None)
    if failure is not None:
        failure.known_to_all = True
        raise failure
    return [value for value, _ in found]


def shared(count: int, work: Callable[[int], T]) -> list[T]:
    """`work` of 0 to count - 1, each done by one process and told to all."""
    rank, world = turn()
    found = gathered(lambda: [work(n) for n in range(rank, count, world)])
    return [found[n % world][n // world] for n in range(count)]


def is_sharded(model: object) -> bool:
    """Whether its weights are cut up, see `language.sharded`."""
    if world_size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def in_step(model: nn.Module) -> bool:
    """Whether its weights are cut up and not whole at present: all processes then run it alike, or wait for ever."""
    if world_size() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in model.parameters())


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
    """What `make` gives on rank 0, on every rank; where it fails there, all of them fail: see `gathered`."""
    return gathered(lambda: make() if turn()[0] == 0 else None)[0]  # type: ignore[return-value]
