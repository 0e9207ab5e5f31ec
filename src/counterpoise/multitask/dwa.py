"""Dynamic weight average (Liu, Johns, Davison, CVPR 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from counterpoise.multitask.losses import Tasks, WindowMeans
from counterpoise.multitask.values import refuse_outside
from counterpoise.multitask.weighting import Weighting


class DWA(Weighting):
    """Weights a task by how slowly its loss falls: w_i = m softmax(r / T)_i with r_i = L_i(t-1) / L_i(t-2), where
    L_i(t) is the mean loss of epoch t (Liu, Johns, Davison: End-to-End Multi-Task Learning with Attention, CVPR 2019,
    eq. 7).

    Uniform (1 each) during the first two epochs. A task that an epoch did not see keeps the r_i of the last two that
    saw it; before those r_i is 1.

    Args, beside those of every `Weighting`:
        steps_per_epoch: after how many `step()`s the averages roll on; the paper's epoch.
        temperature: T; the paper uses 2.

    Examples:
        >>> weighting = DWA(2, steps_per_epoch=1)
        >>> for losses in ([1.0, 1.0], [0.5, 1.0]):
        ...     _ = weighting(torch.tensor(losses))
        ...     weighting.step()
        >>> [round(w, 3) for w in weighting.weights()]
        [0.876, 1.124]
    """

    remembers: ClassVar[Mapping[str, str]] = {
        "sums": "_sums", "seen_steps": "_seen_steps", "steps": "_steps", "epochs": "_epochs",
    }  # fmt: skip

    def __init__(self, tasks: Tasks, *, steps_per_epoch: int, temperature: float = 2.0, micro_batches: int = 1) -> None:
        super().__init__(tasks, micro_batches=micro_batches)
        refuse_outside("[1, inf)", whole=True, steps_per_epoch=steps_per_epoch)
        refuse_outside("(0, inf]", temperature=temperature)
        self.steps_per_epoch, self.temperature = steps_per_epoch, temperature
        self.reset()

    def reset(self) -> None:
        super().reset()
        self._epochs: list[list[float]] = []
        self._begin_epoch()

    def weights(self) -> list[float]:
        """m softmax(r / T), in task order."""
        if len(self._epochs) < 2:
            return [1.0] * len(self.tasks)
        older, newer = self._epochs
        ratios = [b / a if a != 0.0 and math.isfinite(b / a) else 1.0 for a, b in zip(older, newer, strict=True)]
        top = max(ratios)
        raw = [math.exp((r - top) / self.temperature) for r in ratios]
        return [len(raw) * x / sum(raw) for x in raw]

    def update(self, means: WindowMeans) -> None:
        """Add the window to the epoch; at its end, roll on."""
        for i, (mean, count) in enumerate(zip(means.means, means.counts, strict=True)):
            if count > 0.0:
                self._sums[i] += mean
                self._seen_steps[i] += 1
        self._steps += 1
        if self._steps == self.steps_per_epoch:
            newer = self._epochs[-1] if self._epochs else [math.nan] * len(self.tasks)
            older = self._epochs[0] if len(self._epochs) == 2 else newer
            both = zip(self._seen_steps, older, newer, strict=True)
            averages = zip(self._sums, self._seen_steps, newer, strict=True)
            rolled = [[b if n else a for n, a, b in both], [s / n if n else b for s, n, b in averages]]
            self._epochs = rolled if self._epochs else rolled[1:]
            self._begin_epoch()

    def _begin_epoch(self) -> None:
        m = len(self.tasks)
        self._sums, self._seen_steps, self._steps = [0.0] * m, [0] * m, 0
