"""Group DRO (Sagawa, Koh, Hashimoto, Liang, ICLR 2020), on tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from counterpoise.multitask.losses import Tasks, WindowMeans
from counterpoise.multitask.mirror import hold, mirror_step
from counterpoise.multitask.values import refuse_outside
from counterpoise.multitask.weighting import Missing, Weighting


class GroupDRO(Weighting):
    """min over theta, max over all p in the simplex of sum_i p_i l_i, with p_i <- p_i exp(eta l_i) / sum (Sagawa, Koh,
    Hashimoto, Liang: Distributionally Robust Neural Networks for Group Shifts, ICLR 2020, algorithm 1).

    `BanditMTL` without its ball: nothing keeps the weight from ending on one task. Departures: p moves after the
    descent instead of before it, so that it stays fixed inside a window; it is floored at 1e-12; absent tasks
    count with their last known loss (`missing`).

    Args, beside those of every `Weighting`:
        eta: step size of the ascent; the authors' code uses 0.01.

    Examples:
        >>> weighting = GroupDRO(2, eta=1.0)
        >>> _ = weighting(torch.tensor([1.0, 2.0]))
        >>> weighting.step()
        >>> [round(w, 3) for w in weighting.weights()]
        [0.269, 0.731]
    """

    remembers: ClassVar[Mapping[str, str]] = {"log_p": "_log_p"}

    def __init__(
        self,
        tasks: Tasks,
        *,
        eta: float = 0.01,
        micro_batches: int = 1,
        missing: Missing = "last",
        half_life: float = 0.0,
    ) -> None:
        super().__init__(tasks, micro_batches=micro_batches, missing=missing, half_life=half_life)
        refuse_outside("(0, inf)", eta=eta)
        self.eta = eta
        self.reset()

    def reset(self) -> None:
        super().reset()
        self._log_p = [-math.log(len(self.tasks))] * len(self.tasks)

    def weights(self) -> list[float]:
        """p, in task order."""
        return list(map(math.exp, self._log_p))

    def update(self, means: WindowMeans) -> None:
        losses, known = self.compared(means)
        if not all(known):
            losses = hold(self._log_p, losses, known, self.eta)
        self._log_p, _ = mirror_step(self._log_p, losses, math.inf, self.eta)
