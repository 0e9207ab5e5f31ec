"""ExcessMTL: Group DRO's update on excess risks (He, Zhou, Zhang, Yang, Zhao, ICML 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from counterpoise.multitask.groupdro import GroupDRO
from counterpoise.multitask.losses import Batch, Tasks, WindowMeans
from counterpoise.multitask.mirror import hold, mirror_step
from counterpoise.multitask.shared import jacobian, refuse_other_width, shared_parameters
from counterpoise.multitask.values import refuse_outside


class ExcessMTL(GroupDRO):
    """p_i <- p_i exp(eta E_i) / sum, where E_i estimates how far task i's loss is above the least it can have (He, Zhou,
    Zhang, Yang, Zhao: Robust Multi-Task Learning with Excess Risks, ICML 2024, equations 6, 7 and 9): a task whose labels
    are noise has a large loss and no excess, and gets no weight for it.

    E_i = g_i' H_i^-1 g_i with the task's gradient g_i on the shared parameters and H_i the diagonal root of its summed
    squares, over its mean in the first `warmup` windows with the task. One backward pass per task, over the shared
    parameters only, and one number per task and shared parameter to remember.
    Departures: p moves after the descent, so that it stays fixed inside a window, and is floored at 1e-12; absent tasks
    count with their last known excess.

    Args:
        tasks: names, or how many.
        shared: the parameters that all tasks share.
        eta: step size of the ascent; LibMTL's default is 0.01.
        warmup: windows with a task over which its first excess is averaged; the paper takes three epochs. Only windows
            whose excess is above 0 count: until they came, the task keeps its share.

    Examples:
        >>> theta = torch.ones(2, requires_grad=True)
        >>> weighting = ExcessMTL(2, shared=[theta], eta=1.0)
        >>> for falling in (1.0, 0.1):
        ...     weighting([falling * theta[0].square(), theta[1].square()]).backward()
        ...     weighting.step()
        >>> weighting.weights()[0] < 0.45
        True
    """

    whole_batch_only = True
    remembers: ClassVar[Mapping[str, str]] = {
        "log_p": "_log_p", "first": "_first", "excess": "_excess", "squares": "_squares", "windows": "_windows",
        "measured": "_measured",
    }  # fmt: skip
    _measured: Tensor | None

    def __init__(self, tasks: Tasks, *, shared: Iterable[Tensor], eta: float = 0.01, warmup: int = 1) -> None:
        super().__init__(tasks, eta=eta)
        refuse_outside("[1, inf)", whole=True, warmup=warmup)
        self.shared, self.warmup = shared_parameters(shared), warmup

    def reset(self) -> None:
        super().reset()
        m = len(self.tasks)
        self._squares: list[Tensor | None] = [None] * m
        self._first, self._windows, self._excess = [0.0] * m, [0] * m, [math.nan] * m

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        """sum_i p_i l_i; in training also squares each task's gradient on the shared parameters."""
        if self.training and torch.is_grad_enabled():
            self._measured = jacobian(batch.single(), self.shared)[0].square()
        return super().combine(batch, scale_K)

    def update(self, means: WindowMeans) -> None:
        """The ascent on the excess risks of the gradients that `combine` squared."""
        measured_KN, self._measured = self._measured, None
        if measured_KN is None or not bool(measured_KN.isfinite().all()):
            return
        for i, square_N in zip([i for i, c in enumerate(means.counts) if c > 0.0], measured_KN, strict=True):
            before = self._squares[i]
            summed = self._squares[i] = square_N.clone() if before is None else before.to(square_N) + square_N
            excess = float((square_N / torch.sqrt(summed + 1e-7)).double().sum())
            # Of a head of zeros: every later excess over it would be infinite.
            if self._windows[i] < self.warmup and not excess > 0.0:
                continue
            self._windows[i] += 1
            if self._windows[i] > self.warmup:
                self._excess[i] = excess / (self._first[i] + 1e-7)
            else:
                self._first[i] += excess / self.warmup
        known = [math.isfinite(x) for x in self._excess]
        if any(known):
            filled = hold(self._log_p, self._excess, known, self.eta)
            self._log_p, _ = mirror_step(self._log_p, filled, math.inf, self.eta)

    def load_state(self, state: dict[str, Any]) -> None:
        refuse_other_width(self.shared, [*state["squares"], state["measured"]])
        super().load_state(state)

    def abandon(self) -> None:
        self._measured = None
