"""FAMO: fast adaptive multitask optimization (Liu, Feng, Stone, Liu, NeurIPS 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from counterpoise.multitask.losses import Batch, Losses, Tasks, WindowMeans, gather
from counterpoise.multitask.values import refuse_outside
from counterpoise.multitask.weighting import Weighting

_EPSILON = 1e-8


class FAMO(Weighting):
    """Lets every task's loss fall at the same rate: c sum_i z_i log l_i with z = softmax(w), c = 1 / sum_i (z_i / l_i),
    and w <- Adam step along the gradient of sum_i z_i (log l_i before - log l_i after the step) (Liu, Feng, Stone, Liu:
    FAMO, NeurIPS 2023, algorithm 1).

    The losses after the step are those of the same batch, computed again and given to `step(losses_after)`. Departure:
    without them `step()` waits, and takes the next batch's losses as "after", which costs no second pass and adds the
    noise between batches. Losses must be above `min_losses`. Absent tasks, not in the paper, count in c with their last
    known loss and in the comparison with how it last fell; one of which no fall is known falls as the others do on
    average. While the fall of one task alone is known, w stays as it is.

    Args:
        tasks: names, or how many.
        lr: step size of w; the paper uses 0.025.
        weight_decay: decay of w (gamma); 0.001 in the paper's algorithm.
        min_losses: b, a bound that each task's loss stays above, taken off it everywhere; 0 by default.

    Examples:
        >>> weighting = FAMO(2)
        >>> _ = weighting(torch.tensor([1.0, 2.0]))
        >>> weighting.step(torch.tensor([0.5, 1.9]))
        >>> [round(w, 3) for w in weighting.weights()]
        [0.488, 0.512]
    """

    whole_batch_only = True
    remembers: ClassVar[Mapping[str, str]] = {
        "logits": "_logits_M", "adam": "_adam", "before": "_before", "falls": "_falls",
    }  # fmt: skip

    def __init__(
        self, tasks: Tasks, *, lr: float = 0.025, weight_decay: float = 1e-3, min_losses: Sequence[float] | None = None
    ) -> None:
        super().__init__(tasks)
        refuse_outside("[0, inf)", lr=lr, weight_decay=weight_decay)
        self.lr, self.weight_decay = lr, weight_decay
        self.min_losses = [0.0] * len(self.tasks) if min_losses is None else [float(x) for x in min_losses]
        if len(self.min_losses) != len(self.tasks) or not all(map(math.isfinite, self.min_losses)):
            raise ValueError(f"min_losses must be {len(self.tasks)} finite numbers, found {self.min_losses}.")
        self.reset()

    def reset(self) -> None:
        super().reset()
        # A plain tensor: neither the user's optimiser nor .to(dtype) may touch it.
        self._logits_M = torch.zeros(len(self.tasks), dtype=torch.float64)
        self._adam = torch.optim.Adam([self._logits_M], lr=self.lr, weight_decay=self.weight_decay)
        self._before: list[float | None] = [None] * len(self.tasks)
        self._falls = [math.nan] * len(self.tasks)

    def weights(self) -> list[float]:
        """z, in task order."""
        return self._softmax().tolist()  # type: ignore[no-any-return]

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        values_K, indices = self.joined_by_known(batch)
        values_K = values_K - values_K.new_tensor(self.min_losses)[indices]
        z_K = self._softmax()[indices].to(values_K)
        scaled_K = z_K / (values_K.detach() + _EPSILON)
        return (z_K * torch.log(values_K + _EPSILON)).sum() / scaled_K.sum()

    def step(self, losses_after: Losses | None = None) -> None:
        """Close the window; with the losses of the same batch after the optimiser's step, learn from both."""
        super().step()
        if losses_after is not None:
            batch = gather(self.tasks, losses_after)
            after = {i: x for (i, _), x in zip(batch.sizes(), batch.values_K.tolist(), strict=True)}
            self._learn(after)
            self._before = [None if i in after else x for i, x in enumerate(self._before)]

    def update(self, means: WindowMeans) -> None:
        """Learn from the change since the window before, if that one still waits for its losses after."""
        self._refuse_below(means, self.min_losses, "FAMO takes logarithms: give min_losses that lie below every loss.")
        seen = {i: x for i, (x, c) in enumerate(zip(means.means, means.counts, strict=True)) if c > 0.0}
        self._learn(seen)
        self._before = [seen.get(i, x) for i, x in enumerate(self._before)]

    def _softmax(self) -> Tensor:
        return torch.softmax(self._logits_M, dim=0)

    def _learn(self, after: dict[int, float]) -> None:
        before = {i: x - self.min_losses[i] for i, x in enumerate(self._before) if x is not None and i in after}
        after = {i: x - self.min_losses[i] for i, x in after.items()}
        values = [after[i] for i in before] + list(before.values())
        if not before or not all(0.0 <= x < float("inf") for x in values):
            return
        for i, x in before.items():
            self._falls[i] = math.log(x + _EPSILON) - math.log(after[i] + _EPSILON)
        known = [i for i, x in enumerate(self._falls) if math.isfinite(x)]
        if len(known) < 2:
            return
        fall_M, z_M = torch.tensor(self._falls, dtype=torch.float64), self._softmax()
        fall_M[fall_M.isnan()] = (z_M[known] @ fall_M[known]) / z_M[known].sum()
        self._logits_M.grad = z_M * (fall_M - z_M @ fall_M)  # the softmax's transposed Jacobian times the fall
        self._adam.step()
        self._logits_M.grad = None
