"""A resident average of a pair that no single device holds: each process has its share of the model, of PRE and of POST."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from counterpoise.averaging.mix import Donor
from counterpoise.averaging.partition import Partition
from counterpoise.averaging.places import Place, places
from counterpoise.averaging.resident import Objective, ResidentAverage, compute_dtype, load, own_memory
from counterpoise.checkpoints.preflight import Pair
from counterpoise.checkpoints.rounding import key_of, wide_dtype
from counterpoise.language.checkpointing import can_recompute
from counterpoise.language.sharded import cut_up, own_part
from counterpoise.ranks import sum_over_ranks, turn


class ShardedAverage(ResidentAverage):
    """`ResidentAverage` cut up among the processes that have met, by FSDP2 (Zhao et al. 2023, arXiv 2304.11277).

    Each process mixes its own stretch of every tensor, with the bits that the whole has, and takes the inner product of its
    share of a gradient with its share of the update; K sums are then added over the processes. Weights are whole for a block
    at a time, the activations of its layers are computed twice. All processes call everything alike: they run the model in
    step, on the same rows but for the gradient, where `ProxySet` gives each its share of a batch and returns the whole loss.
    Losses and gradients are those of one process up to the order of sums.

    Raises:
        ValueError: a single process, weights of several dtypes.
        CheckpointError: see `ResidentAverage` and `Place.start`.
    """

    def __init__(
        self,
        pair: Pair,
        *,
        donor: Donor = "post",
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self._keys = cache(lambda name: key_of(*pair.tensors(name)))
        model = load(pair, donor, dtype or compute_dtype(pair, device))
        super().__init__(pair, model=model, device=device)
        self.recomputes = can_recompute(self.model)  # no second try: one process alone may lack memory

    _places: dict[str, Stretch]  # type: ignore[assignment]

    def _placed(self, model: nn.Module, device: torch.device) -> tuple[nn.Module, dict[str, Stretch]]:  # type: ignore[override]
        found = places(model, self.pair.shapes, self.pair.post.source)
        starts = {name: place.start for name, place in found.items()}
        own_memory(model.buffers(), device)
        if len(kinds := {str(p.dtype) for p in model.parameters()}) > 1:
            raise ValueError(
                f"shard: expected weights of one dtype, found {' and '.join(sorted(kinds))}; add --dtype float32"
            )
        model = cut_up(model, device, MixedPrecisionPolicy(reduce_dtype=wide_dtype(*model.parameters())))
        held = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        return model, {n: _own(p, starts[n], held) for n, p in found.items()}

    def _is_room(self, device: torch.device, shares: int = 1) -> bool:
        return super()._is_room(device, turn()[1])

    def _sides(self, name: str) -> tuple[Tensor, Tensor]:
        if name in self._held:
            return self._held[name]
        place = self._places[name]
        pre, post = (t.reshape(-1)[place.begin : place.begin + place.count] for t in self.pair.tensors(name))
        return pre, post

    def _noise(self, name: str) -> tuple[int | None, int]:
        return self._keys(name), self._places[name].begin

    def _shared(self, count: int, work: Callable[[int], list[float]]) -> list[list[float]]:
        return [work(n) for n in range(count)]  # each term is shared in itself

    def _term(self, partition: Partition, objective: Objective) -> list[float]:
        loss, *slopes = super()._term(partition, objective)
        return [loss, *sum_over_ranks(slopes)]


@dataclass(frozen=True)
class Stretch(Place):
    """This process's part of a tensor, flat and perhaps empty.

    Attributes:
        begin, count: where in the tensor it begins, and how many elements it has.
        at: where it begins in this process's part of the parameter.
    """

    begin: int = 0
    count: int = 0
    at: int = 0

    def own(self, gradient: Tensor) -> Tensor:
        return own_part(gradient).reshape(-1)[self.at : self.at + self.count]


def _own(place: Place, begin: int, held: Mapping[str, Tensor]) -> Stretch:
    """The place in what this process holds of its parameter: torch's chunk of the rows, or all of a buffer."""
    [(name, before)], (rank, world) = place.parameters.items(), turn()
    assert place.view is not None
    flat, first = own_part(held[name].detach()).reshape(-1), 0
    if isinstance(held[name], DTensor):
        first = rank * math.ceil(len(before) / world) * before[0].numel()
    end = begin + place.view.numel()
    start = min(max(begin, first), end)
    count = max(0, min(end, first + len(flat)) - start)
    at = start - first if count else 0
    return Stretch(place.name, {name: held[name]}, flat[at : at + count], begin=start - begin, count=count, at=at)
