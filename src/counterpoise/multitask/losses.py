"""Task losses and sizes: of one call, by name or in order, and of one optimiser step, over its micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterpoise.ranks import sum_over_ranks, world_size

Tasks = int | Iterable[str]
"""Task names, or how many."""

Losses = Tensor | Mapping[str, Tensor | None] | Sequence[Tensor | None]
"""Task losses: a tensor (m,) or a sequence in task order, or a mapping by task name. None: absent from this batch."""

Counts = Tensor | Mapping[str, float] | Sequence[float]
"""Sizes per task: in task order or by name. 0: absent from this batch."""


class Batch(NamedTuple):
    """The losses of one call: values of the k tasks present, their indices and sizes (None: all tasks, 1 each).

    Attributes:
        apart: the losses as they came, when they came one by one. A backward pass from one of these costs that loss's
            own graph; from an element of `values_K` it sends zeros through the graphs of all the others as well.
    """

    values_K: Tensor
    present: list[int] | None
    counts: list[float] | None
    apart: list[Tensor] | None = None

    def sizes(self) -> Iterator[tuple[int, float]]:
        """The index and the size of each task present."""
        present = range(len(self.values_K)) if self.present is None else self.present
        return zip(present, self.counts or [1.0] * len(present), strict=True)

    def of_present(self, values_M: Tensor) -> Tensor:
        """Of a value per task, (m,) or (..., m), those of the tasks present."""
        return values_M if self.present is None else values_M[..., self.present]

    def single(self) -> Sequence[Tensor]:
        """The k losses as scalars to start a backward pass from."""
        return self.values_K.unbind() if self.apart is None else self.apart


def task_names(tasks: Tasks) -> tuple[str, ...]:
    """Task names from names or a number, refusing an empty or repeating list.

    Examples:
        >>> task_names(3)
        ('0', '1', '2')
    """
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be a number or a list of names, found the string {tasks!r}: write [{tasks!r}].")
    if isinstance(tasks, set | frozenset):
        raise TypeError(
            f"tasks must be in an order, found the set {tasks!r}, whose order differs by process: pass sorted(...)."
        )
    if isinstance(tasks, bool) or not isinstance(tasks, Integral | Iterable):
        raise TypeError(f"tasks must be a number or a list of names, found {tasks!r}.")
    names = tuple(str(i) for i in range(tasks)) if isinstance(tasks, Integral) else tuple(tasks)
    if not names:
        raise ValueError(f"expected at least one task, found tasks={tasks!r}.")
    if wrong := [n for n in names if not isinstance(n, str)]:
        raise TypeError(f"task names must be strings, found {wrong[0]!r} ({type(wrong[0]).__name__}).")
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"task names must differ, found more than once: {repeated}. Give each task its own name.")
    return names


def check_names(tasks: Sequence[str], given: Iterable[str], what: str) -> None:
    """Raise unless `given` names exactly the tasks."""
    found = set(given)
    if unknown := sorted(found - set(tasks)):
        raise KeyError(
            f"{what} name tasks that do not exist: {unknown}. Name the tasks {list(tasks)}, as they are built."
        )
    if missing := [t for t in tasks if t not in found]:
        absent = {"losses": ": None for a task that is absent from this batch", "counts": ": 0 for one that is absent"}
        raise KeyError(
            f"{what} lack the tasks {missing}; found {sorted(found)}. Give each a value{absent.get(what, '')}."
        )


def by_task(tasks: Sequence[str], sizes: Counts, what: str) -> list[float]:
    """Sizes as floats in task order, refusing wrong names, lengths and negative or non-finite numbers."""
    if isinstance(sizes, Mapping):
        check_names(tasks, sizes, what)
        values = [float(sizes[t]) for t in tasks]
    else:
        try:
            values = [float(x) for x in (sizes.tolist() if isinstance(sizes, Tensor) else sizes)]
        except (TypeError, ValueError):
            raise TypeError(f"{what} must hold one number per task, in order or by name, found {sizes!r}.") from None
        if len(values) != len(tasks):
            raise ValueError(f"{what} must hold one number per task, expected {len(tasks)}, found {len(values)}.")
    for task, value in zip(tasks, values, strict=True):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{what} must be finite and >= 0, found {value} for task {task!r}.")
    return values


def gather(tasks: Sequence[str], losses: Losses, counts: Counts | None = None) -> Batch:
    """Read the losses of one call, scalars, into task order; the loss of a task with a count of 0 is not looked at.

    Raises:
        KeyError: a mapping with unknown names, or lacking some.
        ValueError: wrong lengths or shapes, or no task present.
    """
    sizes = None if counts is None else by_task(tasks, counts, "counts")
    all_here = sizes is None or 0.0 not in sizes
    if isinstance(losses, Tensor):
        if losses.shape != (len(tasks),) or not losses.is_floating_point():
            found = f"{tuple(losses.shape)} of {losses.dtype}"
            raise ValueError(f"losses must have shape ({len(tasks)},), a float per task, found {found}.")
        return Batch(losses, None, sizes) if all_here else _partial(tasks, losses.unbind(), sizes)
    if isinstance(losses, Mapping):
        try:
            items = [losses[t] for t in tasks]
        except KeyError:
            items = []
        if len(losses) != len(tasks) or not items:
            check_names(tasks, losses, "losses")
    elif len(losses) == len(tasks):
        items = list(losses)
    else:
        raise ValueError(f"losses must hold one entry per task, expected {len(tasks)}, found {len(losses)}.")
    if all_here:
        try:
            return Batch(_stack(tasks, items), None, sizes, items)  # type: ignore[arg-type]
        except TypeError:  # some are None: looking for them first would cost every call a microsecond
            pass
    return _partial(tasks, items, sizes)


def _partial(tasks: Sequence[str], items: Sequence[Tensor | None], sizes: list[float] | None) -> Batch:
    present = [i for i, loss in enumerate(items) if loss is not None and (sizes is None or sizes[i] > 0.0)]
    if sizes is not None and (silent := [tasks[i] for i, x in enumerate(items) if x is None and sizes[i] > 0.0]):
        raise ValueError(f"tasks {silent} have a count above 0 but no loss: give a loss, or a count of 0.")
    if not present:
        raise ValueError(f"no task of {list(tasks)} is present in this call: expected at least one loss.")
    names, kept = [tasks[i] for i in present], [items[i] for i in present]
    if not all(isinstance(x, Tensor) for x in kept):
        raise _not_scalars(names, kept)
    return Batch(_stack(names, kept), present, sizes and [sizes[i] for i in present], kept)  # type: ignore[arg-type]


def _stack(tasks: Sequence[str], items: list[Tensor | None]) -> Tensor:
    """Stack scalars; a TypeError when some item is no tensor."""
    try:
        values = torch.stack(items)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise _not_scalars(tasks, items) from error
    if values.dim() != 1:
        raise _not_scalars(tasks, items)
    if not values.is_floating_point():
        raise ValueError(f"every loss must be a floating-point number, found {values.dtype}.")
    return values


def _not_scalars(tasks: Sequence[str], items: Sequence[Tensor | None]) -> ValueError:
    pairs = list(zip(tasks, items, strict=True))
    devices = {t: str(x.device) for t, x in pairs if isinstance(x, Tensor)}
    if len({*devices.values()}) > 1:
        return ValueError(f"every loss must be on one device, found {devices}. Move them to one with .to(...).")
    found = {t: tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for t, x in pairs}
    return ValueError(f"every loss must be a scalar tensor on one device, found {found}. Reduce each to its mean.")


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
        self.seen: list[list[float]] = []
        """The sizes of each call, over all ranks, where each is a window of its own to `shares.Shares`."""
        self._pending: list[Batch] = []

    def refuse_if_complete(self, batch: Batch, totals: list[float] | None, micro_batches: int) -> None:
        """Raise when this call would begin a second window: a forgotten `step()` would silently stop the weighting."""
        if self.calls and totals != self.totals:
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
        if batch.present is None and batch.counts is None and self.calls == 1:
            self.counts = [1.0] * self.tasks
        else:
            for i, count in batch.sizes():
                self.counts[i] += count
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

    def change_unit(self, starts: Sequence[float], slopes: Sequence[float]) -> None:
        """Count every loss collected, by task, as start + slope * loss."""
        self._fold()
        self.sums = [a * n + b * x for a, b, n, x in zip(starts, slopes, self.counts, self.sums, strict=True)]

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on inside this window."""
        self._fold()
        return {
            "calls": self.calls,
            "seen": torch.tensor(self.seen, dtype=torch.float64),
            "sums": torch.tensor(self.sums, dtype=torch.float64),
            "counts": torch.tensor(self.counts, dtype=torch.float64),
            "totals": None if self.totals is None else torch.tensor(self.totals, dtype=torch.float64),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.clear()
        self.calls, self.seen = int(state["calls"]), state["seen"].tolist() if "seen" in state else []
        self.sums = state["sums"].tolist()
        self.counts = state["counts"].tolist()
        self.totals = None if state["totals"] is None else state["totals"].tolist()

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
