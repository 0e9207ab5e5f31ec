"""SMA: the moving average of the weights in place of the weights, and Elastic Reset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise.alignment.mitigations.lowrank import is_low_rank
from counterpoise.alignment.training.models import weights_before
from counterpoise.alignment.training.sharding import part_like
from counterpoise.alignment.training.stepping import Mitigation, Step, trainable
from counterpoise.language.sharded import own_part


@dataclass
class MovingAverage(Mitigation):
    """The result is the exponential moving average of the weights, begun at those before alignment.

    After each step average <- decay * average + (1 - decay) * theta. With `reset_every`, Elastic Reset (Noukhovitch et
    al. 2023, arXiv 2312.07551, algorithm 1): each so many steps theta <- average, then average <- pre. Departs from it
    in that the result is the average, as HMA's comparison has it (SMA), unless training ends on a reset; the optimiser's
    moments are kept.

    Args:
        decay: in [0, 1); 0 is no averaging.
        reset_every: optimiser steps between resets; None never resets.
        pre: what the average returns to at a reset; None copies the model's weights. Takes memory for one average.
            With LoRA it is the factors that are averaged, and they return to their own start, at which the model is PRE.

    Raises:
        ValueError: a decay or a number of steps out of range.

    >>> MovingAverage(0.99).describe()
    {'name': 'MovingAverage', 'decay': 0.99}
    """

    decay: float = 0.995
    reset_every: int | None = None
    pre: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"sma: expected a decay in [0, 1), found {self.decay}")
        if self.reset_every is not None and self.reset_every < 1:
            raise ValueError(f"sma: expected a reset every 1 or more steps, found {self.reset_every}")

    def start(self, model: nn.Module, tokenizer: object) -> None:
        self._steps = 0
        self._average = {name: p.detach().clone() for name, p in trainable(model).items()}
        if self.reset_every and is_low_rank(model):
            self._pre = {name: own_part(average).clone() for name, average in self._average.items()}
        else:
            self._pre = weights_before(model, self.pre, "sma") if self.reset_every else {}

    @torch.no_grad()
    def after_update(self, step: Step) -> None:
        self._steps += 1
        parameters = trainable(step.model)
        for name, average in self._average.items():
            average.lerp_(parameters[name], 1 - self.decay)
        if self.reset_every and self._steps % self.reset_every == 0:
            for name, average in self._average.items():
                parameters[name].copy_(average)
                own_part(average).copy_(self._pre[name])

    @contextmanager
    def as_finished(self, model: nn.Module) -> Iterator[None]:
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def finish(self, model: nn.Module) -> None:
        self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        """Exchange the weights and their average, one tensor at a time."""
        if self.reset_every and self._steps and self._steps % self.reset_every == 0:
            return  # the model is the last average, and the average is PRE
        parameters = trainable(model)
        for name, average in self._average.items():
            weights = parameters[name].detach().clone()
            parameters[name].copy_(average)
            average.copy_(weights)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
        for name, average in self._average.items():
            own_part(average).copy_(part_like(state["average"][name], average))
