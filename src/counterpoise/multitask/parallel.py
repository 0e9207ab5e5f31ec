"""The little that the weightings need to know about other processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

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
