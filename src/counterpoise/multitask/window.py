"""The losses of one optimiser step, collected over its micro-batches and ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from counterpoise.multitask.losses import Batch
from counterpoise.ranks import sum_over_ranks, world_size


class WindowMeans(NamedTuple):
    """Means and sizes per task over a whole window, on all ranks; a task that was absent has size 0 and mean 0."""

    means: list[float]
    counts: list[float]


class Window:
    """Sums of losses and sizes per task since the last optimiser step.

    Losses on a GPU stay there as they come and cross to the host together, in their order, when the window closes or is
    saved: one synchronisation per window, and the same sums bit for bit whether or not it was saved half way.
    """

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks
        self.clear()

    def clear(self) -> None:
        """Forget what was collected: no calls, sums and sizes of 0."""
        self.calls = 0
        self.sums = [0.0] * self.tasks
        self.counts = [0.0] * self.tasks
        self.totals: list[float] | None = None
        self._pending: list[Batch] = []

    def refuse_if_complete(self, batch: Batch, totals: list[float] | None, micro_batches: int) -> None:
        """Raise when this call would begin a second window: a forgotten `step()` would silently stop the weighting."""
        if self.calls == 0:
            return
        if totals != self.totals:
            raise RuntimeError(
                f"window_counts changed inside a window, from {self.totals} to {totals}: every call between two "
                f"step()s must be given the same totals. Was step() forgotten after the optimiser's step?"
            )
        if totals is None:
            if self.calls < micro_batches:
                return
            raise RuntimeError(
                f"expected at most {micro_batches} call(s) before step(), found one more: call step() after the "
                f"optimiser's step, or, when accumulating gradients, say micro_batches=... at construction."
            )
        for i, count in batch.sizes():
            after = self.counts[i] + count
            if after > totals[i] * (1.0 + 1e-9):
                raise RuntimeError(
                    f"the calls since the last step() hold {after:g} of task {i}, window_counts promised "
                    f"{totals[i]:g}: call step() after the optimiser's step, or correct window_counts."
                )

    def add(self, batch: Batch, totals: list[float] | None) -> None:
        """Count the losses and sizes of one call, and remember the totals that it promised."""
        self.calls += 1
        self.totals = totals
        self._count(batch)
        self._pending.append(Batch(batch.values_K.detach(), batch.present, batch.counts))
        if not batch.values_K.is_cuda:
            self._fold()

    def close(self) -> WindowMeans:
        """The means over all micro-batches and ranks, the same bits on every rank; empties the window."""
        self._fold()
        sums, counts = self.sums, self.counts
        if world_size() > 1:
            both = sum_over_ranks(sums + counts)
            sums, counts = both[: self.tasks], both[self.tasks :]
        self.clear()
        return WindowMeans([s / c if c > 0.0 else 0.0 for s, c in zip(sums, counts, strict=True)], counts)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on inside this window."""
        self._fold()
        return {
            "calls": self.calls,
            "sums": torch.tensor(self.sums, dtype=torch.float64),
            "counts": torch.tensor(self.counts, dtype=torch.float64),
            "totals": None if self.totals is None else torch.tensor(self.totals, dtype=torch.float64),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.clear()
        self.calls = int(state["calls"])
        self.sums = state["sums"].tolist()
        self.counts = state["counts"].tolist()
        self.totals = None if state["totals"] is None else state["totals"].tolist()

    def _count(self, batch: Batch) -> None:
        if batch.present is None and batch.counts is None and self.calls == 1:
            self.counts = [1.0] * self.tasks
            return
        for i, count in batch.sizes():
            self.counts[i] += count

    def _fold(self) -> None:
        for batch, values in zip(self._pending, self._on_the_host(), strict=True):
            if batch.present is None and batch.counts is None and not any(self.sums):
                self.sums = values
                continue
            for (i, count), value in zip(batch.sizes(), values, strict=True):
                self.sums[i] += value * count
        self._pending.clear()

    def _on_the_host(self) -> list[list[float]]:
        """The values of each pending call, by one transfer."""
        waiting = [batch.values_K for batch in self._pending]
        if len(waiting) < 2:
            return [values_K.tolist() for values_K in waiting]
        together = torch.cat([values_K.double() for values_K in waiting]).cpu()
        return [part.tolist() for part in torch.split(together, [len(values_K) for values_K in waiting])]
