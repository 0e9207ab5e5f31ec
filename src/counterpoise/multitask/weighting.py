"""The one interface of all weightings: losses in, one scalar out; then `step()` after the optimiser's step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from counterpoise.multitask.losses import Batch, Counts, Losses, Tasks, Window, WindowMeans, by_task, gather, task_names
from counterpoise.ranks import sum_over_ranks, world_size


class Weighting(nn.Module, ABC):
    """Losses in, one scalar out: the base of every method in this package.

    A *window* is what lies between two optimiser steps: one call, or several when gradients are accumulated. A method
    implements `combine` (the scalar of one call) and, when it learns, `update` (from the window's means) and
    `state`/`load_state`. Reading the losses, windows, ranks, non-finite losses and checkpoints are here.

    In evaluation mode (`weighting.eval()`) a call returns the scalar and records nothing.

    Everything a method remembers is in `state_dict()` as float64 or Python numbers that `.to(dtype)` does not touch,
    and a load into a fresh object continues bit for bit, also inside a window.

    Args:
        tasks: names, or how many.
        micro_batches: the most calls between two `step()`s when `window_counts` are not given. One more call raises.

    Raises:
        KeyError: losses or counts with unknown task names, or lacking one.
        ValueError: repeated names, wrong lengths or shapes, no task present.
        RuntimeError: a second window begun without `step()`, or `step()` without a call.
    """

    whole_batch_only: ClassVar[bool] = False
    """The method needs all the losses of a window in one call on one process, and raises otherwise."""

    def __init__(self, tasks: Tasks, *, micro_batches: int = 1) -> None:
        super().__init__()
        if micro_batches < 1:
            raise ValueError(f"micro_batches must be at least 1, found {micro_batches}.")
        if self.whole_batch_only and micro_batches > 1:
            raise ValueError(f"{self._one_call_needed()} Found micro_batches={micro_batches}: leave it at 1.")
        self.tasks = task_names(tasks)
        self.micro_batches = micro_batches
        self.averages_gradients = True
        """Whether each backward pass averages the gradients of the method's own parameters over the ranks, which must
        then run equally many. `with_weighting` turns it off and averages once per optimiser step."""
        self.last_losses = [math.nan] * len(self.tasks)
        """The last mean loss seen of each task, in task order; NaN before the first."""
        self.updates = self.skipped = 0
        """How many windows it has learned from, and how many it dropped for a non-finite loss."""
        self._window = Window(len(self.tasks))

    def forward(self, losses: Losses, counts: Counts | None = None, window_counts: Counts | None = None) -> Tensor:
        """The scalar to call `backward()` on.

        Args:
            losses: the mean loss of each task on this micro-batch of this rank; None for an absent task.
            counts: how many examples (or tokens) each mean stands for; 1 each by default, 0 for an absent task.
            window_counts: the sizes of the whole window, over all its micro-batches and ranks. With them the
                gradients add up to those of the one big batch (and must not be divided by the number of micro-batches);
                without them only the update of the weights is that of the big batch.
        """
        batch = gather(self.tasks, losses, counts)
        totals = None if window_counts is None else by_task(self.tasks, window_counts, "window_counts")
        if self.whole_batch_only:
            self._refuse_parts(batch, totals)
        if self.training:
            self._window.refuse_if_complete(batch, totals, self.micro_batches)
        scalar = self.combine(batch, self._scale(batch, totals))
        if self.training:
            self._window.add(batch, totals)
        return scalar

    def step(self) -> None:
        """Close the window: learn from its losses. Call it after the optimiser's step.

        A window with a non-finite loss changes nothing and is counted in `skipped`.
        """
        means = self._window.close()
        if not any(means.counts):
            raise RuntimeError("step() closes a window, found none open: call the weighting on the losses first.")
        own = vars(self)  # assigning to a module's attribute costs microseconds
        if not all(map(math.isfinite, means.means)):
            own["skipped"] += 1
            self.abandon()
            return
        triples = zip(means.means, means.counts, self.last_losses, strict=True)
        own["last_losses"] = [mean if count else before for mean, count, before in triples]
        self.update(means)
        own["updates"] += 1

    def discard(self) -> None:
        """Drop the open window, for instance after a batch that ran out of memory and will not be stepped."""
        self._window.clear()
        self.abandon()

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger: losses of the last window, their variance, counters, and the weights in use."""
        found = {f"loss/{t}": x for t, x in zip(self.tasks, self.last_losses, strict=True) if math.isfinite(x)}
        if known := list(found.values()):
            mean = sum(known) / len(known)
            found["task_variance"] = sum((x - mean) ** 2 for x in known) / len(known)
            found["worst_task_loss"] = max(known)
        found |= {"updates": float(self.updates), "skipped": float(self.skipped)}
        return found | {f"weight/{t}": w for t, w in zip(self.tasks, self.weights() or [], strict=False)}

    @abstractmethod
    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        """The scalar of one call.

        Args:
            batch: the losses of the k tasks present.
            scale_K: the factor that turns each mean into its part of the window's mean; None: 1.
        """

    def update(self, means: WindowMeans) -> None:
        """Learn from a window's losses; nothing by default."""

    def abandon(self) -> None:
        """Forget what `combine` put aside for `update`; nothing by default."""

    def weights(self) -> list[float] | None:
        """The weights in use, in task order, when the method has them before it sees the losses."""
        return None

    def state(self) -> dict[str, Any]:
        """What the method itself must remember; nothing by default."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` gave; nothing by default."""

    def get_extra_state(self) -> dict[str, Any]:
        """The part of `state_dict()` that is not parameters."""
        return {
            "method": type(self).__name__,
            "tasks": list(self.tasks),
            "updates": self.updates,
            "skipped": self.skipped,
            "losses": torch.tensor(self.last_losses, dtype=torch.float64),
            "window": self._window.state(),
            **self.state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take back `get_extra_state()`, refusing the state of another method or of other tasks."""
        if state["method"] != type(self).__name__:
            raise ValueError(f"expected the state of {type(self).__name__}, found that of {state['method']}.")
        if tuple(state["tasks"]) != self.tasks:
            raise ValueError(
                f"expected the state of the tasks {list(self.tasks)}, found {state['tasks']}: build the weighting with "
                f"the tasks of the saved run, in their order, or start without its state."
            )
        self.last_losses, self.updates, self.skipped = state["losses"].tolist(), state["updates"], state["skipped"]
        self._window.load(state["window"])
        self.load_state(state)

    def _scale(self, batch: Batch, totals: list[float] | None) -> Tensor | None:
        """world * count / window count: gradients are averaged over ranks and added over micro-batches."""
        totals = self._totals(batch, totals)
        if totals is None:
            return None
        if short := [self.tasks[i] for i, _ in batch.sizes() if totals[i] <= 0.0]:
            raise ValueError(f"window_counts are 0 for tasks that are present: {short}. Count every micro-batch.")
        return on_device([world_size() * c / totals[i] for i, c in batch.sizes()], batch.values_K.device)

    def _totals(self, batch: Batch, totals: list[float] | None) -> list[float] | None:
        """The window's sizes: as given, or this call's over all ranks (one collective); None: this call is all."""
        if totals is not None or world_size() == 1:
            return totals
        mine = dict(batch.sizes())
        return sum_over_ranks([mine.get(i, 0.0) for i in range(len(self.tasks))])

    def _refuse_parts(self, batch: Batch, totals: list[float] | None) -> None:
        if (world := world_size()) > 1:
            raise RuntimeError(f"{self._one_call_needed()} Found {world} processes: train on one, or choose another.")
        if totals is not None and any(totals[i] > c * (1 + 1e-9) for i, c in batch.sizes()):
            counts = [c for _, c in batch.sizes()]
            raise RuntimeError(f"{self._one_call_needed()} Found window_counts={totals} for counts={counts}.")

    def _one_call_needed(self) -> str:
        return f"{type(self).__name__} needs the whole batch in one call: no gradient accumulation, one process."


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """The values in float64, or float32 on Apple's GPUs, which have nothing wider."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def wide(values: Tensor) -> Tensor:
    """The values in float32 at least: logarithms and weights near 1e-3 lose a digit in bfloat16."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def weighted_sum(weights_K: Tensor, values_K: Tensor, scale_K: Tensor | None) -> Tensor:
    """sum_i w_i scale_i l_i, in float32 at least."""
    values_K = wide(values_K)
    if scale_K is not None:
        weights_K = weights_K.to(scale_K) * scale_K
    if weights_K.dtype != values_K.dtype or weights_K.device != values_K.device:
        weights_K = weights_K.to(values_K.device, values_K.dtype, non_blocking=True)
    return torch.dot(weights_K, values_K)
