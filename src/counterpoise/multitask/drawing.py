"""Which task each row of training is of: as its column says, or drawn by a mixture's weights as they move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Sampler, Subset


def task_indices(
    values: Iterable[Any], tasks: Sequence[str], column: str, numbered: Sequence[str] | None = None, among: str = ""
) -> list[int]:
    """The place among the tasks of each value of a column: a task's name, or an index into `numbered`, by default the tasks
    themselves. `among` says of which rows they are the first, second and so on."""
    found = []
    for row, value in enumerate(values):
        name = value if isinstance(value, str) else _numbered(value, numbered or tasks)
        if name not in tasks:
            meant = f" ({name!r})" if name not in (None, value) else ""
            raise ValueError(
                f"column {column!r}, row {row}{among}: expected one of {list(tasks)} or its index, found {value!r}{meant}."
            )
        found.append(tasks.index(name))
    return found


def task_in(row: Mapping[str, Any], column: str) -> Any:
    """What a row holds under the column's name; a row without it is a ValueError."""
    if column not in row:
        raise no_column(column, row)
    return row[column]


def tasks_of(
    rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], column: str, numbered: Sequence[str] | None = None
) -> list[int]:
    """The place of each row's task; a row without one is a ValueError."""
    return task_indices((task_in(row, column) for row in rows), tasks, column, numbered, " of a batch")


def tasks_named(data: Any, tasks: Sequence[str], column: str, numbered: Sequence[str] | None) -> set[str]:
    """The tasks that have a row, where that is to be had without making the rows: in data sets of `datasets` and lists."""
    values: Iterable[Any] = ()
    if isinstance(data, list):
        values = (row.get(column) for row in data)
    elif hasattr(data, "unique") and column in data.column_names:
        values = data.unique(column)
    return {*tasks} & {x if isinstance(x, str) else _numbered(x, numbered or tasks) for x in values}


def numbered_names(data: Any, tasks: Sequence[str], column: str) -> Sequence[str] | None:
    """Into what a whole number in the column is an index: the names of its `datasets.ClassLabel`; None: not known."""
    every = [names for names in _label_names(data, column) if names != _numbers(names)]
    if not every or tuple(tasks) == _numbers(tasks):
        return None
    if len({*every}) > 1:
        raise ValueError(f"column {column!r}: expected class labels of one order, found different names: {every}.")
    if lacking := [t for t in tasks if t not in every[0]]:
        raise ValueError(
            f"column {column!r} holds class labels of the names {list(every[0])}, expected the tasks {list(tasks)} among "
            f"them, found no {lacking}: rename the labels, or give the bandit or weighting their names as tasks."
        )
    return every[0]


def _numbered(value: Any, names: Sequence[str]) -> str | None:
    """The name that a whole number is the index of, also one that is a float or a tensor; None: it is none."""
    try:
        number = int(value)
        return names[number] if number == value and 0 <= number < len(names) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _label_names(data: Any, column: str) -> Iterator[tuple[str, ...]]:
    if isinstance(data, Subset):
        yield from _label_names(data.dataset, column)
    for part in data.datasets if isinstance(data, ConcatDataset) else ():
        yield from _label_names(part, column)
    features = getattr(data, "features", None)  # of a stream that was mapped: None
    if isinstance(features, Mapping) and (names := getattr(features.get(column), "names", None)):
        yield tuple(names)


def _numbers(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(i) for i in range(len(names)))


def no_column(column: str, found: Iterable[str]) -> ValueError:
    """The error of a row or batch without its task."""
    return ValueError(
        f"expected a column {column!r} that names each row's task, found only {sorted(found)}: add it to the data set, "
        f"or pass task_column=..."
    )


def quotas(probabilities: Sequence[float], size: int, u: float) -> list[int]:
    """How many of `size` rows are each task's: whole numbers within 1 of size times p, whose mean over u in [0, 1) is that.

    Examples:
        >>> quotas([0.5, 0.25, 0.25], 8, 0.3), quotas([0.5, 0.25, 0.25], 3, 0.3)
        ([4, 2, 2], [1, 1, 1])
    """
    edges = np.floor(size * np.cumsum(probabilities) + u)
    edges[-1] = size
    return np.diff(edges, prepend=0.0).astype(int).tolist()  # type: ignore[no-any-return]


class Schedule:
    """The tasks of the rows, in rounds. What was drawn in an epoch is remembered, so that a resumed run draws it again.

    A round is drawn when its first row is asked for, by the probabilities of that moment: data loaders read ahead, and
    how far is theirs to say. The random numbers are keyed by seed, epoch and round.

    Args:
        probabilities: of the tasks, adding up to 1, as they are now.
        seed: of the draws, >= 0.
    """

    def __init__(self, probabilities: Callable[[], Sequence[float]], seed: int = 0) -> None:
        self.probabilities, self.seed, self.size = probabilities, seed, 1
        self.sizes: list[int] = []  # how many rows each task has, where that is known
        self.reset()

    def reset(self) -> None:
        """Forget what was drawn."""
        self.epoch, self.rounds = 0, list[list[int]]()
        self.before = [0] * len(self.probabilities())

    def begin(self, epoch: int) -> None:
        """Read from the beginning of an epoch on; the one that is on its way is read again as it was drawn."""
        if epoch != self.epoch:
            self.epoch, self.before, self.rounds = epoch, self.drawn(), []

    def drawn(self) -> list[int]:
        """How many rows of each task were drawn, since the beginning of training."""
        return np.sum([self.before, *self.rounds], axis=0).tolist()  # type: ignore[no-any-return]

    def round(self, number: int) -> list[int]:
        """The task of each row of a round of this epoch."""
        random = np.random.default_rng([self.seed, self.epoch, number])
        u, order = random.random(), random.permutation(self.size)
        if number == len(self.rounds):
            self.rounds.append(quotas(self.probabilities(), self.size, u))
        tasks = np.repeat(np.arange(len(self.before)), self.rounds[number])
        return tasks[order].tolist()  # type: ignore[no-any-return]

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: the rounds of this epoch, (rounds, m), and the rows of those before, (m,)."""
        shape = (len(self.rounds), len(self.before))
        rounds_RM = torch.tensor(self.rounds, dtype=torch.int32).reshape(shape)
        of = {"seed": self.seed, "sizes": list(self.sizes)}
        return {"epoch": self.epoch, "size": self.size, "before": list(self.before), "rounds": rounds_RM, **of}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`, refusing rounds of another size, seed or data: their rows would be others."""
        for name, what in (("seed", "data_seed or seed"), ("sizes", "data: its rows by task are")):
            if state.get(name, now := getattr(self, name)) != now:
                raise ValueError(
                    f"expected the mixture of a run with the {what} {now}, found {state[name]}: resume with those, or start "
                    f"from the checkpoint's weights."
                )
        if state["size"] != self.size:
            raise ValueError(
                f"expected the mixture of a run with {self.size} rows an optimiser step, found one with {state['size']}: "
                f"resume with its batch size, accumulation and number of processes."
            )
        self.epoch, self.before, self.rounds = state["epoch"], list(state["before"]), state["rounds"].tolist()


class MixtureSampler(Sampler[int]):
    """Row numbers: each round's tasks by the schedule, and of each task its rows in a new order each time round.

    Args:
        schedule: of the tasks.
        rows: the row numbers of each task.
        rounds: in an epoch.
        epoch: which one is on its way, asked for when an iterator is made.
        repeat: how often a round comes in a row; `mini`: how often each of its rows does (GRPO's `RepeatSampler`).
    """

    def __init__(
        self,
        schedule: Schedule,
        rows: Sequence[Sequence[int]],
        rounds: int,
        epoch: Callable[[], int],
        *,
        repeat: int = 1,
        mini: int = 1,
    ) -> None:
        self.schedule, self.rows, self.rounds, self.epoch = schedule, rows, rounds, epoch
        self.repeat, self.mini = repeat, mini

    def __len__(self) -> int:
        return self.rounds * self.schedule.size * self.repeat * self.mini

    def __iter__(self) -> Iterator[int]:
        self.schedule.begin(self.epoch())
        places = list(self.schedule.before)
        orders = [(-1, np.empty(0, int))] * len(places)
        for number in range(self.rounds):
            chosen = []
            for task in self.schedule.round(number):
                time, place = divmod(places[task], len(self.rows[task]))
                if orders[task][0] != time:
                    random = np.random.default_rng([self.schedule.seed, task, time, 1])
                    orders[task] = time, random.permutation(len(self.rows[task]))
                chosen.append(self.rows[task][orders[task][1][place]])
                places[task] += 1
            for _ in range(self.repeat):
                for row in chosen:
                    yield from [row] * self.mini


class Interleaved:
    """Rows of several streams without end, as `datasets.interleave_datasets` with "all_exhausted" gives them, by a
    schedule: a stream that ends begins anew, with the `set_epoch` of it and of its source where they have one.
    """

    def __init__(
        self,
        streams: Mapping[str, Iterable[Any]],
        schedule: Schedule,
        epoch: Callable[[], int],
        column: str,
        sources: Mapping[str, Iterable[Any]] | None = None,
    ) -> None:
        self.streams, self.schedule, self.epoch, self.column = streams, schedule, epoch, column
        self.sources = sources or streams

    def __call__(self) -> Iterator[dict[str, Any]]:
        """The rows, with each one's task under the column's name."""
        self.schedule.begin(self.epoch())
        names = list(self.streams)
        reading = [self._without_end(name) for name in names]
        for number in count():
            for task in self.schedule.round(number):
                row = next(reading[task])
                if not isinstance(row, Mapping):
                    found = f"{type(row).__name__}, {row!r:.60}"
                    raise TypeError(f"task {names[task]!r}: expected rows of values by column, found {found}.")
                yield {**row, self.column: names[task]}

    def _without_end(self, name: str) -> Iterator[Any]:
        for time in count():
            for stream in (self.streams[name], self.sources[name]):
                if hasattr(stream, "set_epoch"):
                    stream.set_epoch(time)
            found = False
            for row in self.streams[name]:
                found = True
                yield row
            if not found:
                raise ValueError(f"task {name!r}: expected a stream of rows, found none in it; leave the task out")


def as_stream(rows: Iterable[Any]) -> Any:
    """A stream of `datasets`, which can be mapped, of any other."""
    from datasets import IterableDataset

    return rows if isinstance(rows, IterableDataset) else IterableDataset.from_generator(partial(iter, rows))
