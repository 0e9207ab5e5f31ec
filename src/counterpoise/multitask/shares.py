"""How large a part of the rows is each task's, estimated from the windows so far."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

RARE = 20.0
"""So many times what a row counts in the plain mean, and its task is called rare."""


def rare(tasks: Sequence[str], weights: Sequence[float], shares: Sequence[float]) -> str | None:
    """What is said of the tasks of which a row counts `RARE` times and more; None where there is none."""
    triples = zip(tasks, weights, shares, strict=True)
    times = {t: w / sum(weights) / s for t, w, s in triples if s > 0.0 and w > RARE * s * sum(weights)}
    told = ", ".join(f"{t!r} {x:.0f} times" for t, x in times.items())
    return told and (
        f"a row counts more than in the plain mean of the losses, by its task's weight over its share of the rows: of {told}. "
        f'Steps that hold one are large; BanditMTL with prior="proportional" or "sqrt" starts from the shares.'
    )


BLOCK, FAR = 200, 8.0
"""Each block of so many windows is compared with those before it: so many standard errors apart, a share has changed."""


class Shares:
    """The share of the rows that is each task's: the mean, over the windows so far, of its count over all counts.

    A row's weight is divided by it. The window at hand takes part: over all orders of the same windows, a task's count
    over its share then adds up to 1 exactly. The first window that holds a task says only that there is such a task,
    and a task's share is that of the windows after it. Else one that comes late, as in data that is sorted by task,
    would have its first rows multiplied by the number of windows before.

    Attributes:
        windows, sums, squares: how many windows, and of each task its shares in them.
        after, later: how many windows came after the first with the task (-1: it never came), and its shares in these.
    """

    def __init__(self, tasks: int) -> None:
        self.windows, self.sums, self.squares = 0, [0.0] * tasks, [0.0] * tasks
        self.after, self.later = [-1] * tasks, [0.0] * tasks
        self._block: tuple[int, list[float]] | None = (0, self.sums)

    def and_also(self, windows: Sequence[Sequence[float]]) -> Shares:
        """With these windows counted too, in a copy."""
        if not windows:
            return self
        joined = copy.deepcopy(self)
        for counts in windows:
            joined.add(counts)
        return joined

    def including(self, counts: Sequence[float]) -> list[float]:
        """The shares, were a window of these counts the last, each since its task came; they need not add up to 1."""
        everything = sum(counts)
        triples = zip(counts, self.after, self.later, strict=True)
        return [c / everything if n < 0 else (s + c / everything) / (n + 1) for c, n, s in triples]

    def of_all(self, counts: Sequence[float]) -> list[float]:
        """The shares of all windows, this one the last; they add up to 1."""
        everything, n = sum(counts), self.windows + 1
        return [(s + c / everything) / n for s, c in zip(self.sums, counts, strict=True)]

    def known(self) -> list[float]:
        """The shares as they are, each since its task came."""
        return [s / n if n > 0 else first for first, n, s in zip(self.sums, self.after, self.later, strict=True)]

    def add(self, counts: Sequence[float]) -> None:
        """Count a window."""
        everything = sum(counts)
        shares = [c / everything for c in counts]
        self.windows += 1
        self.sums = [s + x for s, x in zip(self.sums, shares, strict=True)]
        self.squares = [s + x**2 for s, x in zip(self.squares, shares, strict=True)]
        self.later = [s + x if n >= 0 else 0.0 for s, x, n in zip(self.later, shares, self.after, strict=True)]
        self.after = [n + 1 if n >= 0 or x > 0.0 else n for n, x in zip(self.after, shares, strict=True)]

    def moved(self, tasks: Sequence[str]) -> str | None:
        """What is said, once, of the tasks whose share in the last `BLOCK` windows is not that of all before; asked after
        each window, it looks at the end of a block."""
        if self._block is None or self.windows - self._block[0] < BLOCK:
            return None
        (n, sums), new = self._block, self.windows - self._block[0]
        self._block = self.windows, self.sums
        if not n:
            return None
        changed = []
        for task, old, now, error in zip(tasks, sums, self.sums, self.errors(), strict=True):
            before, after = old / n, (now - old) / new
            spread = error * math.sqrt(self.windows * (1.0 / n + 1.0 / new))
            if before > 0.0 and abs(after - before) > max(FAR * spread, 0.1 * before):
                changed.append(f"{task!r} from {before:.3g} to {after:.3g}")
        if not changed:
            return None
        self._block = None
        return (
            f"in the last {new} windows tasks' shares of the rows are not what they were: of {', '.join(changed)}. Rows "
            f"are weighed by the share over all windows, so these count too much or too little for long: where the "
            f"loader changes, call reset()."
        )

    def errors(self) -> list[float]:
        """The standard error of each share, as of windows drawn independently; infinite before the second."""
        n = self.windows
        if n < 2:
            return [math.inf] * len(self.sums)
        pairs = zip(self.sums, self.squares, strict=True)
        return [math.sqrt(max(q - s * s / n, 0.0) / (n * (n - 1))) for s, q in pairs]

    def state(self) -> Tensor:
        """Windows, sums, squares, windows after the first, and sums of those, (1 + 4 m,)."""
        numbers = [float(self.windows), *self.sums, *self.squares, *map(float, self.after), *self.later]
        return torch.tensor(numbers, dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Go on from `state()`. In an older one, (1 + 2 m,), every task was there from the first window on."""
        m = len(self.sums)
        windows, *rest = state.tolist()
        self.windows, self.sums, self.squares = int(windows), rest[:m], rest[m : 2 * m]
        since, later = rest[2 * m : 3 * m], rest[3 * m :]
        self.after = [int(n) for n in since] or [self.windows if s > 0.0 else -1 for s in self.sums]
        self.later = later or list(self.sums)
        self._block = (self.windows, self.sums)
