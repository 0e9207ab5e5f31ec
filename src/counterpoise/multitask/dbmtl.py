"""Dual-balancing multi-task learning (Lin et al., 2023)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from counterpoise.multitask.jacobian import JacobianWeighting
from counterpoise.multitask.losses import Batch, Tasks, WindowMeans
from counterpoise.multitask.shared import refuse_other_width
from counterpoise.multitask.values import refuse_outside

_EPSILON = 1e-8


class DBMTL(JacobianWeighting):
    """Balances losses by their logarithm and gradients by their length: the sum of the running averages of
    grad log l_i, each brought to the length of the longest (Lin et al.: Dual-Balancing for Multi-Task Learning, 2023,
    algorithm 1, as LibMTL has it). The heads get the gradient of log l_i. Losses must be positive; near 0 steps grow.

    An absent task takes part with its average as it stands. One number per task and shared parameter to remember.

    Args, beside those of every `JacobianWeighting`:
        forgetting: beta, the share of the past in the average, in [0, 1).

    Examples:
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> DBMTL(2, shared=[theta], forgetting=0.0)([theta[0] * 2, theta[1].square()]).backward()
        >>> theta.grad
        tensor([2., 2.])
    """

    _waiting_MN: Tensor | None
    remembers: ClassVar[Mapping[str, str]] = {"average": "_average_MN", "waiting": "_waiting_MN"}

    def __init__(self, tasks: Tasks, *, shared: Iterable[Tensor], forgetting: float = 0.9) -> None:
        refuse_outside("[0, 1)", forgetting=forgetting)
        super().__init__(tasks, shared=shared, aggregate=_equally_long)
        self.forgetting, self.missing = forgetting, "last"
        self.reset()

    def reset(self) -> None:
        super().reset()
        self._average_MN: Tensor | None = None

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        """The sum of the logarithms, with the shared parameters' gradient exchanged."""
        logs = [torch.log(x + _EPSILON) for x in batch.single()]
        present = [i for i, _ in batch.sizes()]
        return super().combine(Batch(torch.stack(logs), present, batch.counts, logs), scale_K)

    def rows(self, rows_KN: Tensor, present: list[int]) -> Tensor:
        """The averages of all tasks, (m, n); in training kept for `update`."""
        averages_MN = rows_KN.new_zeros(len(self.tasks), rows_KN.shape[1])
        if self._average_MN is not None:
            averages_MN += self._average_MN.to(averages_MN)
        averages_MN[present] = rows_KN + self.forgetting * (averages_MN[present] - rows_KN)
        if self.training:
            self._waiting_MN = averages_MN
        return averages_MN

    def update(self, means: WindowMeans) -> None:
        """Keep the averages that `combine` made."""
        self._refuse_below(means, [0.0] * len(self.tasks), "DBMTL takes logarithms: add a constant to the task's loss.")
        if self._waiting_MN is not None:
            self._average_MN, self._waiting_MN = self._waiting_MN, None

    def load_state(self, state: dict[str, Any]) -> None:
        refuse_other_width(self.shared, [state["average"], state["waiting"]])
        super().load_state(state)

    def abandon(self) -> None:
        self._waiting_MN = None


def _equally_long(rows_MN: Tensor) -> Tensor:
    lengths_M = rows_MN.norm(dim=1)
    return (lengths_M.max() / (lengths_M + _EPSILON)) @ rows_MN  # type: ignore[no-any-return]
