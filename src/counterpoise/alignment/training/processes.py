"""Data parallelism of the plain loops: every process takes its share of the rows. Who holds which weights: sharding.py.

torchrun or accelerate starts the processes. Prompts, kept responses and decisions are the same in all of them, in the
same order; shared are the batches that are drawn, the rewards of what was drawn, and the rows of an optimiser step, whose
gradients are added up. In one process nothing here costs or changes anything.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from counterpoise.language.scoring import by_length
from counterpoise.ranks import ALONE, TOLD, gathered, world_size

T = TypeVar("T")
ASSUMED_SHARES = 8
"""Processes among which weights are cut up, where torchrun has not said."""
PATIENCE = timedelta(hours=12)
"""How long a process waits for the others: one may draw and score long responses meanwhile."""
SILENCE = {True: 1, False: 60}
"""Seconds in which the first process may tell an error and end the others, by whether it is sure to have met it too."""


def started() -> int:
    """How many processes torchrun or accelerate started, whether or not they have met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device | str, shard: int = 1) -> None:
    """Meet the other processes that torchrun or accelerate started; nothing in one process, or when it was done before.

    Args:
        shard: how many the weights are to be cut up among.

    Raises:
        ValueError: something that torchrun sets beside WORLD_SIZE is missing; not as many as `shard`, where that is not 1.
    """
    count = dist.get_world_size() if dist.is_initialized() else started()
    if shard not in (1, count):
        more = f"start it with torchrun --nproc-per-node {shard}"
        raise ValueError(f"shard: expected {shard} processes, found {count}; {more}")
    if count == 1 or dist.is_initialized():
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(own_device(device))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


def asked_for(sharded: str) -> bool:
    """Whether accelerate was started with FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{sharded}", "false").lower() in ("true", "1")


def expected(shard: bool) -> int | None:
    """How many processes `shard` will find (one is a ValueError), None before torchrun has said so; 1 without `shard`."""
    if not shard:
        return 1
    if "WORLD_SIZE" not in os.environ:
        return None
    if started() == 1:
        raise ValueError(ALONE)
    return started()


def refuse_sharded(method: str, *, cut_up: bool) -> None:
    """Raise a ValueError under DeepSpeed, and under accelerate's FSDP where `shard` did not cut the model up."""
    for sharded in ("FSDP", "DEEPSPEED"):
        if asked_for(sharded) and not (sharded == "FSDP" and cut_up):
            raise ValueError(
                f"{method}: expected whole weights in every process, found {sharded}; use torchrun, or accelerate's plain "
                "data parallelism; rsf and ppo are cut up by align --shard"
            )


def own_device(device: torch.device | str) -> torch.device:
    """Of this process: where there are several, cuda is the GPU number LOCAL_RANK of those that it sees.

    Raises:
        ValueError: one GPU for several processes of this machine.
    """
    found, local = torch.device(device), int(os.environ.get("LOCAL_RANK", "0"))
    several = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
    if several and found.type == "cuda" and found.index is not None and torch.cuda.device_count() != 1:  # 1: its own
        raise ValueError(f"device: expected cuda, of which each process of torchrun takes one, found {device}")
    if started() > 1 and found.type == "cuda" and found.index is None:
        return torch.device("cuda", local % max(1, torch.cuda.device_count()))
    return found


def rank() -> int:
    """The number of this process, from 0."""
    if world_size() > 1:
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if started() > 1 else 0


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


class Rows(list[int]):
    """Indices of one micro-batch; of weight 0 where the rows are another process's and what they give does not count."""

    weight = 1


def shared_by_length(lengths: Sequence[int], batch_size: int, *, together: bool = False) -> Iterator[Rows]:
    """`by_length` over this process's share: each world-th of the rows, counted from the longest.

    With `together` every process yields equally often, as weights that are cut up need it: one that has no rows left
    gets the last row with weight 0.
    """
    longest_first = [i for rows in by_length(lengths, max(1, len(lengths)), key=lambda n: n) for i in rows]
    own = longest_first[rank() :: world_size()] if world_size() > 1 else longest_first
    for start in range(0, len(own), batch_size):
        yield Rows(own[start : start + batch_size])
    if together:
        most = -(-len(lengths) // world_size())  # the first process's
        for _ in range(-(-most // batch_size) - -(-len(own) // batch_size)):
            idle = Rows(longest_first[-1:])
            idle.weight = 0
            yield idle


def on_first(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, which alone does it; the others wait, and its errors are raised in all."""
    return gathered(lambda: work() if is_first() else None)[0]  # type: ignore[return-value]


def add_up(tensor: Tensor) -> Tensor:
    """The tensors of all processes, added; in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def add_up_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add the gradients of all processes, in float32 or wider; the same bits in all. A missing one counts as zero.

    Gradients of weights that are cut up are left alone: FSDP adds them up itself.
    """
    if world_size() == 1:
        return
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wide = own.to(torch.promote_types(own.dtype, torch.float32)).contiguous()
        parameter.grad = add_up(wide).to(own.dtype)


@contextmanager
def one_message() -> Iterator[None]:
    """Errors that all processes meet are told by the first, of one alone by it; the others end with exit status 1."""
    try:
        yield
    except TOLD as error:
        if is_first() or world_size() == 1:
            raise
        known = getattr(error, "known_to_all", False)
        time.sleep(SILENCE[known])  # torchrun ends all when one has ended: the first one speaks before
        if known:
            raise SystemExit(1) from None
        raise
