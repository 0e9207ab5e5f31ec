"""The one interface of all weightings: losses in, one scalar out; then `step()` after the optimiser's step."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from counterpoise.multitask.losses import (
    Batch,
    Counts,
    Losses,
    Tasks,
    Window,
    WindowMeans,
    by_task,
    gather,
    task_names,
)
from counterpoise.multitask.shares import Shares, rare
from counterpoise.multitask.values import frozen, on_device, refuse_outside, thawed, weighted_sum, wide
from counterpoise.ranks import sum_over_ranks, world_size

ALONE = 20
"""So many windows in a row from which nothing can be learned are said once."""
SEEN = 200
"""After so many windows tasks are named of which a row counts much, see `shares.RARE`."""

Missing = Literal["last", "hold"]
"""What an absent task counts with: its last known loss, or what leaves its share of the weight as it is."""


class Weighting(nn.Module):
    """Losses in, one scalar out: the base of every method in this package.

    A *window* is what lies between two optimiser steps: one call, or several when gradients are accumulated. A method
    implements `combine` (the scalar of one call) and, when it learns, `update` (from the window's means) and
    `state`/`load_state`. Reading the losses, windows, ranks, non-finite losses and checkpoints are here.

    A task's rows count by its weight over the share of the rows that is the task's (`share_of_rows`), so that the
    expected scalar is the sum of weight times mean loss whatever the loader: a task that is rarely drawn counts no less,
    and in a batch that holds every task in its usual share each mean has its weight.

    In evaluation mode (`weighting.eval()`) a call returns sum w_i l_i, records nothing and waits for no process.

    Everything a method remembers is in `state_dict()` as float64 or Python numbers that `.to(dtype)` does not touch,
    and a load into a fresh object continues bit for bit, also inside a window.

    Args:
        tasks: names, or how many.
        micro_batches: the most calls between two `step()`s when `window_counts` are not given. One more call raises.
        missing: what a task that is not in a window counts with. "last": its last known loss, so that loaders which
            give one task a batch teach as much as full batches do. "hold": nothing; only the tasks of one window are
            compared.
        half_life: with "last", the known loss of an absent task is an average over the windows that held it, whose weight
            halves after so many of them; 0: the last one alone. It calms the weights where few tasks share a small batch;
            a task that is there counts with its loss there, and nothing changes where all always are.

    Warns:
        UserWarning: once, after `ALONE` windows in a row from which a method that compares tasks could learn nothing, or
            whose losses were not finite; after `SEEN` where a row of a rare task counts 20 times and more; and where a
            task's share of the rows is no longer what it was.

    Raises:
        KeyError: losses or counts with unknown task names, or lacking one.
        ValueError: repeated names, wrong lengths or shapes, no task present.
        RuntimeError: a second window begun without `step()`, or `step()` without a call.
    """

    whole_batch_only: ClassVar[bool] = False
    """The method needs all the losses of a window in one call on one process, and raises otherwise."""

    remembers: ClassVar[Mapping[str, str]] = {}
    """The attributes that a method learns, by their names in its state: lists, tensors, numbers, torch's optimisers."""

    compares = True
    """The method learns from how the tasks differ, so that one which only ever sees one task learns nothing."""

    def __init__(
        self, tasks: Tasks, *, micro_batches: int = 1, missing: Missing = "last", half_life: float = 0.0
    ) -> None:
        super().__init__()
        refuse_outside("[1, inf)", whole=True, micro_batches=micro_batches)
        refuse_outside("[0, inf)", half_life=half_life)
        if self.whole_batch_only and micro_batches > 1:
            raise ValueError(f"{self._one_call_needed()} Found micro_batches={micro_batches}: leave it at 1.")
        if missing not in ("last", "hold"):
            raise ValueError(f'missing must be "last" or "hold", found {missing!r}.')
        if half_life and missing == "hold":
            raise ValueError(f'half_life is for missing="last", found {half_life} with "hold".')
        self.missing, self.half_life = missing, half_life
        self.tasks = task_names(tasks)
        self.micro_batches = micro_batches
        self.averages_gradients = True
        """Whether each backward pass averages the gradients of the method's own parameters over the ranks, which must
        then run equally many. `with_weighting` turns it off and averages once per optimiser step."""
        Weighting.reset(self)  # a method's own comes when its settings are there

    def reset(self) -> None:
        """Forget everything learned, as if freshly built; the settings stay."""
        m = len(self.tasks)
        self.last_losses = [math.nan] * m
        """The last mean loss seen of each task, in task order; NaN before the first."""
        self.updates = self.skipped = 0
        """How many windows it has learned from, and how many it dropped for a non-finite loss."""
        self._window, self._shares = Window(m), Shares(m)
        self._joined: Shares | None = None
        self._known, self._alone, self._dropped = list(self.last_losses), 0, 0
        self.abandon()

    def extra_repr(self) -> str:
        """The settings, by the names that the constructor has for them."""
        names = [n for n in inspect.signature(type(self)).parameters if n in vars(self) and n != "shared"]
        return ", ".join(f"{n}={vars(self)[n]!r}" for n in names)

    def forward(self, losses: Losses, counts: Counts | None = None, window_counts: Counts | None = None) -> Tensor:
        """The scalar to call `backward()` on.

        Args:
            losses: the mean loss of each task on this micro-batch of this rank; None for an absent task (a mean of no
                rows in a tensor poisons gradients, whatever its count).
            counts: how many examples (or tokens) each mean stands for; 1 by default, 0 for an absent task.
            window_counts: the sizes of the whole window, over all its micro-batches and ranks. With them the
                gradients add up to those of the one big batch (and must not be divided by the number of micro-batches);
                without them only the update of the weights is that of the big batch.
        """
        batch = gather(self.tasks, losses, counts)
        totals = None if window_counts is None else by_task(self.tasks, window_counts, "window_counts")
        if self.training:
            if self.whole_batch_only:
                self._refuse_parts(batch, totals)
            self._window.refuse_if_complete(batch, totals, self.micro_batches)
        scale_K, window = self._scale(batch, totals)
        scalar = self.combine(batch, scale_K)
        if self.training:
            self._window.add(batch, totals)
            if window is not None and totals is None:  # each call is then a window of its own to the shares
                self._window.seen.append(window)
                if self._joined is not None:
                    self._joined.add(window)
        return scalar

    def step(self) -> None:
        """Close the window: learn from its losses. Call it after the optimiser's step.

        A window with a non-finite loss changes nothing and is counted in `skipped`.
        """
        seen, means = self._window.seen, self._window.close()
        vars(self)["_joined"] = None
        if not any(means.counts):
            raise RuntimeError("step() closes a window, found none open: call the weighting on the losses first.")
        own = vars(self)  # assigning to a module's attribute costs microseconds
        if not all(map(math.isfinite, means.means)):
            own["skipped"] += 1
            own["_dropped"] += 1
            self.abandon()
            if self._dropped == ALONE:
                lost = [t for t, x in zip(self.tasks, means.means, strict=True) if not math.isfinite(x)]
                warnings.warn(
                    f"{type(self).__name__}: {ALONE} windows in a row had a loss that is not finite (now of {lost}), so "
                    f"nothing was learned from them: look where it comes from, or leave such rows out.",
                    stacklevel=2,
                )
            return
        own["_dropped"] = 0
        own["last_losses"] = [x if c else old for x, c, old in zip(*means, self.last_losses, strict=True)]
        self._know(means)
        for counts in seen or [means.counts]:
            self._shares.add(counts)
        self._say_shares()
        self.update(means)
        own["updates"] += 1

    def compared(self, means: WindowMeans) -> tuple[list[float], list[bool]]:
        """The losses to compare, in task order, and for which tasks there is one: those of the window, and with
        `missing="last"` the known losses of the others."""
        here = [c > 0.0 for c in means.counts]
        if self.missing == "hold" or all(here):
            return means.means, here
        losses = [x if seen else k for x, seen, k in zip(means.means, here, self._known, strict=True)]
        known = [math.isfinite(x) for x in losses]
        return [x if k else 0.0 for x, k in zip(losses, known, strict=True)], known

    def joined_by_known(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """The values of the tasks present, then, as constants, the known ones of those absent; and their indices."""
        present = [i for i, _ in batch.sizes()]
        absent = set() if self.missing == "hold" else set(range(len(self.tasks))) - set(present)
        known = sorted(i for i in absent if math.isfinite(self._known[i]))
        values_K = wide(batch.values_K)
        return torch.cat([values_K, values_K.new_tensor([self._known[i] for i in known])]), present + known

    def _refuse_below(self, means: WindowMeans, least: Sequence[float], instead: str) -> None:
        for task, mean, count, low in zip(self.tasks, *means, least, strict=True):
            if count and mean < low:
                raise ValueError(f"expected losses of at least {low:g}, found {mean:g} of task {task!r}: {instead}")

    def discard(self) -> None:
        """Drop the open window, for instance after a batch that ran out of memory and will not be stepped."""
        self._window.clear()
        self._joined = None
        self.abandon()

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger: losses of the last window, their variance, counters, the weights in use, and, where
        windows differ in it, each task's share of the rows with its standard error."""
        found = {f"loss/{t}": x for t, x in zip(self.tasks, self.last_losses, strict=True) if math.isfinite(x)}
        if known := list(found.values()):
            mean = sum(known) / len(known)
            found["task_variance"] = sum((x - mean) * (x - mean) for x in known) / len(known)
            found["worst_task_loss"] = max(known)
        if any(errors := self._shares.errors()) and self._shares.windows > 1:
            for task, total, error in zip(self.tasks, self._shares.sums, errors, strict=True):
                found |= {f"share/{task}": total / self._shares.windows, f"share_error/{task}": error}
        found |= {"updates": float(self.updates), "skipped": float(self.skipped)}
        return found | {f"weight/{t}": w for t, w in zip(self.tasks, self.weights() or [], strict=False)}

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        """The scalar of one call: of the losses of the k tasks present, each with its weight of `weights()`, and times
        the factor that turns it into its part of the window's mean (None: 1)."""
        weights_M = torch.tensor(self.weights(), dtype=torch.float64)
        return weighted_sum(batch.of_present(weights_M), batch.values_K, scale_K)

    def update(self, means: WindowMeans) -> None:
        """Learn from a window's losses; nothing by default."""

    def abandon(self) -> None:
        """Forget what `combine` put aside for `update`; nothing by default."""

    def weights(self) -> list[float] | None:
        """The weights in use, in task order, when the method has them before it sees the losses."""
        return None

    def state(self) -> dict[str, Any]:
        """What the method itself must remember: the attributes that `remembers` names."""
        return {name: frozen(vars(self)[attribute]) for name, attribute in self.remembers.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` gave; what an older state lacks stays as it is at the start."""
        for name, attribute in self.remembers.items():
            if name in state:
                vars(self)[attribute] = thawed(state[name], vars(self)[attribute])

    def get_extra_state(self) -> dict[str, Any]:
        """The part of `state_dict()` that is not parameters."""
        return {
            "method": type(self).__name__,
            "tasks": list(self.tasks),
            "updates": self.updates,
            "skipped": self.skipped,
            "losses": torch.tensor(self.last_losses, dtype=torch.float64),
            "known": torch.tensor(self._known, dtype=torch.float64),
            "alone": self._alone,
            "shares": self._shares.state(),
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
        before = self.get_extra_state()
        try:
            self._take(state)
        except Exception:
            self._take(before)
            raise

    def _take(self, state: dict[str, Any]) -> None:
        self.last_losses, self.updates, self.skipped = state["losses"].tolist(), state["updates"], state["skipped"]
        # An older state holds none of the three.
        self._shares.load(state.get("shares", Shares(len(self.tasks)).state()))
        self._known, self._alone = state.get("known", state["losses"]).tolist(), state.get("alone", 0)
        self._window.load(state["window"])
        self._joined = None
        self.load_state(state)

    def _know(self, means: WindowMeans) -> None:
        """Keep each task's known loss, and say once that nothing can be learned."""
        own, known = vars(self), self.last_losses  # see `step`
        if self.half_life:
            fresh = 1.0 - 0.5 ** (1.0 / self.half_life)
            triples = zip(self._known, means.means, means.counts, strict=True)
            known = [k if c == 0.0 else x if math.isnan(k) else k + fresh * (x - k) for k, x, c in triples]
        own["_known"] = known
        if not self.compares or len(self.tasks) == 1 or self._alone >= ALONE:
            return
        several = 0.0 not in means.counts or sum(self.compared(means)[1]) > 1
        own["_alone"] = 0 if several else self._alone + 1
        if self._alone == ALONE:
            there = next(t for t, c in zip(self.tasks, means.counts, strict=True) if c > 0.0)
            nothing, instead = " and nothing is known of the others", "let the batches alternate between the tasks"
            if self.missing == "hold":
                nothing, instead = "", "take a weighting that remembers, as BanditMTL with missing='last' does"
            warnings.warn(
                f"{type(self).__name__}: {ALONE} windows in a row held one task alone (now {there!r}){nothing}, so no "
                f"weight was learned from them: mix the tasks in each batch or window, or {instead}.",
                stacklevel=3,
            )

    def share_of_rows(self, counts: Sequence[float]) -> list[float]:
        """The share of the rows that is each task's, known or estimated, when the window at hand holds these counts."""
        return self._shares_now().including(counts)

    def _shares_now(self) -> Shares:
        """The shares with the calls of the open window, each of which is added once."""
        if not self._window.seen:
            return self._shares
        vars(self)["_joined"] = joined = self._joined or self._shares.and_also(self._window.seen)
        return joined

    def _say_shares(self) -> None:
        """Name the tasks of which a row counts much more than in the plain mean, and those whose share has changed."""
        told = self._shares.moved(self.tasks) if getattr(self, "drawn_by", None) is None else None
        if self.updates == SEEN:
            told = rare(self.tasks, self.weights() or [1.0] * len(self.tasks), self._shares.known()) or told
        if told and not self.whole_batch_only and not getattr(self, "samples", False):  # those weigh no row
            warnings.warn(f"{type(self).__name__}: {told}", stacklevel=3)

    def _scale(self, batch: Batch, totals: list[float] | None) -> tuple[Tensor | None, list[float] | None]:
        """world * count / (window count * share), and the window's counts: gradients are averaged over ranks and added
        over micro-batches, and E[count / window count] is the share, so each mean is multiplied with 1 in expectation."""
        if self.whole_batch_only or not self.training:
            return None, None
        window = totals
        if window is None:  # this call's over all ranks
            here = dict(batch.sizes())
            window = sum_over_ranks([here.get(i, 0.0) for i in range(len(self.tasks))])
        everything, shares = sum(window) / world_size(), self.share_of_rows(window)
        factors = [c / (everything * shares[i]) for i, c in batch.sizes()]
        return None if set(factors) == {1.0} else on_device(factors, batch.values_K.device), window

    def _refuse_parts(self, batch: Batch, totals: list[float] | None) -> None:
        if (world := world_size()) > 1:
            raise RuntimeError(f"{self._one_call_needed()} Found {world} processes: train on one, or choose another.")
        if totals is not None and sum(totals) > sum(counts := [c for _, c in batch.sizes()]) * (1 + 1e-9):
            raise RuntimeError(f"{self._one_call_needed()} Found window_counts={totals} for counts={counts}.")

    def _one_call_needed(self) -> str:
        return f"{type(self).__name__} needs the whole batch in one call: no gradient accumulation, one process."
