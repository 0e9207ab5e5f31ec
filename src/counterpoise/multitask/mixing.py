"""Rows drawn, task by task, by a bandit's weights: what the trainers of losses and of rewards share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from counterpoise.multitask.bandit import BanditMTL
from counterpoise.multitask.drawing import (
    Interleaved,
    MixtureSampler,
    Schedule,
    numbered_names,
    task_in,
    task_indices,
)
from counterpoise.multitask.losses import Counts, by_task
from counterpoise.multitask.per_task import PerTask
from counterpoise.multitask.values import refuse_outside
from counterpoise.ranks import sum_over_ranks, world_size

FAR = 2.5
"""Steps between the weights and the rows that are drawn by them, above which it is told."""


class Mixed(PerTask):
    """The drawing."""

    called = "mixture"
    columns_may_differ = False
    balance: BanditMTL
    train_dataset: Any
    streams: Mapping[str, Any] | None = None

    def __init__(
        self,
        *args: Any,
        mixture: BanditMTL,
        task_column: str = "task",
        reference: Counts | None = None,
        improvement: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if not isinstance(mixture, BanditMTL):
            raise TypeError(f"mixture must be a BanditMTL, found {type(mixture).__name__}.")
        if not mixture.samples:
            raise ValueError('mixture must draw the rows: expected BanditMTL(..., drawn_by="p").')
        refuse_outside("[0, inf)", improvement=improvement)
        if isinstance(reference, Mapping):
            refuse_other_tasks("reference: expected a loss for each", reference, mixture.tasks)
        above = None if reference is None else by_task(mixture.tasks, reference, "reference")
        self._meanwhile = {"corrects": False, "improvement": improvement, "reference": above}
        """The bandit's attributes while this trainer trains."""
        settings = next((x for x in (*args, *kwargs.values()) if isinstance(x, TrainingArguments)), None)
        self.balance = mixture
        self.schedule = Schedule(self.probabilities_of_tasks)
        self._saw_losses = False
        _refuse(settings)
        data = args[3] if len(args) > 3 else kwargs.get("train_dataset")  # their place in every trainer's arguments
        if isinstance(data, IterableDataset):
            raise ValueError(
                "a stream of all tasks cannot be drawn by task: expected train_dataset={task: stream, ...}."
            )
        if isinstance(data, Mapping):
            refuse_other_tasks("train_dataset: expected data", data, mixture.tasks)
            data = self._joined({t: data[t] for t in mixture.tasks}, settings, task_column)
        if len(args) > 3:
            args = (*args[:3], data, *args[4:])
        else:
            kwargs["train_dataset"] = data
        super().__init__(*args, balance=mixture, task_column=task_column, **kwargs)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.schedule.seed, self.schedule.size = seed, self.rows_of_a_round()
        self._meanwhile["micro_batches"] = max(mixture.micro_batches, self.args.gradient_accumulation_steps)

    def _joined(self, sets: dict[str, Any], settings: Any, column: str) -> Any:
        """One data set of all, with a task column."""
        import datasets

        sets = {t: datasets.Dataset.from_list(x) if isinstance(x, list) else x for t, x in sets.items()}
        streams = [isinstance(x, IterableDataset | datasets.IterableDataset) for x in sets.values()]
        if not any(streams):
            if wrong := [f"{t}: {type(x).__name__}" for t, x in sets.items() if not isinstance(x, datasets.Dataset)]:
                raise ValueError(
                    f"train_dataset: expected a datasets.Dataset or a list of rows for each task, found {wrong}: make it "
                    f"one, or give one data set of all tasks whose rows name theirs in {column!r}."
                )
            columns = {t: {*x.column_names} - {column} for t, x in sets.items() if len(x)}
            kept = set[str]().union(*columns.values())
            shared = kept.intersection(*columns.values())
            if not self.columns_may_differ and kept != shared:  # else the rows of some tasks would hold None there
                if not shared:
                    raise ValueError(f"train_dataset: expected columns that all tasks have, found {columns}.")
                warnings.warn(f"train_dataset: left out {sorted(kept - shared)}, which some tasks lack.", stacklevel=2)
                kept = shared
            dropped = ({*x.column_names} & {column} if not len(x) else {*x.column_names} - kept for x in sets.values())
            rows = [x.remove_columns(sorted(names)) for x, names in zip(sets.values(), dropped, strict=True)]
            named = zip(sets, rows, strict=True)
            return datasets.concatenate_datasets([x.add_column(column, [t] * len(x)) for t, x in named])
        if not all(streams):
            raise ValueError("train_dataset: expected streams or data sets with a length for all tasks, found both.")
        _refuse_for_streams(settings)
        self.streams = sets  # as they were given: TRL prepares them one by one
        return self.interleaved(sets, column)

    def interleaved(self, streams: Mapping[str, Any], column: str) -> Any:
        """One stream of all, drawn by the schedule."""
        from datasets import IterableDataset

        return IterableDataset.from_generator(
            Interleaved(streams, self.schedule, self.epoch_on_its_way, column, self.streams)
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The base's; before and after it, in a loop of one's own, the bandit is as it was built."""
        settings = vars(self.balance)
        before = {name: settings[name] for name in self._meanwhile}
        settings.update(self._meanwhile)
        try:
            return super().train(*args, **kwargs)
        finally:
            settings.update(before)

    def probabilities_of_tasks(self) -> list[float]:
        """By what the rows are drawn now."""
        return self.balance.probabilities().tolist()  # type: ignore[no-any-return]

    def epoch_on_its_way(self) -> int:
        """The number of the epoch; training that begins forgets what was drawn before."""
        state = getattr(self, "state", None)
        if state is None or state.global_step == 0:
            self.schedule.reset()
            return 0
        return 0 if isinstance(self.train_dataset, IterableDataset) else int(state.epoch)  # a stream is one epoch

    def rows_of_a_round(self) -> int:
        """The rows of one optimiser step, over all ranks."""
        ranks = 1 if self.accelerator.dataloader_config.split_batches else world_size()
        return self._train_batch_size * self.args.gradient_accumulation_steps * ranks  # type: ignore[no-any-return]

    def batches_of_a_round(self) -> int:
        """How many batches of the data loader they are."""
        return self.args.gradient_accumulation_steps  # type: ignore[no-any-return]

    def get_train_dataloader(self) -> Any:
        """The base's; says how far ahead its workers read."""
        ahead = self.args.dataloader_num_workers * (self.args.dataloader_prefetch_factor or 2)
        if (rounds := 1 + ahead / self.batches_of_a_round()) > FAR:
            warnings.warn(
                f"dataloader_num_workers={self.args.dataloader_num_workers}: rows are drawn by the weights of about "
                f"{rounds:.0f} steps before (in GRPO and RLOO: generations), as workers read {ahead} batches ahead. Take "
                f"fewer, or a smaller dataloader_prefetch_factor.",
                stacklevel=2,
            )
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> MixtureSampler:
        data = self.train_dataset if train_dataset is None else train_dataset
        rows = self._rows_of_tasks(data)
        if lacking := [t for t, found in zip(self.balance.tasks, rows, strict=True) if not found]:
            raise ValueError(f"tasks without a row in the training data: {lacking}; leave them out of the mixture.")
        base: Any = super()._get_train_sampler(train_dataset)
        self.schedule.sizes = [*map(len, rows)]
        return MixtureSampler(
            self.schedule,
            rows,
            math.ceil(len(data) / self.schedule.size),
            self.epoch_on_its_way,
            repeat=getattr(base, "repeat_count", 1),
            mini=getattr(base, "mini_repeat_count", 1),
        )

    def _rows_of_tasks(self, data: Any) -> list[list[int]]:
        names = getattr(data, "column_names", None)
        if names is None:
            column: Iterable[Any] = (task_in(data[i], self.task_column) for i in range(len(data)))
        elif self.task_column in names:
            column = data[self.task_column]
        else:
            raise self.no_column(names)
        tasks, rows = self.balance.tasks, list[list[int]]([] for _ in self.balance.tasks)
        numbered = numbered_names(data, tasks, self.task_column)
        for number, task in enumerate(task_indices(column, tasks, self.task_column, numbered)):
            rows[task].append(number)
        return rows

    def observe(self, sums_M: Tensor, counts_M: Tensor) -> None:
        """Give the bandit the losses of some rows: their sum and number by task."""
        counts = counts_M.tolist()
        if any(counts):
            self.balance.observe(sums_M.detach() / counts_M.clamp(min=1.0), counts)
            self._saw_losses = True

    def window_is_open(self) -> bool:
        """Whether any rank has seen losses since the last optimiser step."""
        if self.accelerator.is_main_process and not any(self.schedule.drawn()):
            raise ValueError(
                f"{type(self).__name__}: a step was trained on rows that the mixture did not draw. Expected the base to build "
                f"its data loader with _get_train_sampler, or with the stream it is given: leave get_train_dataloader to it."
            )
        (saw,) = sum_over_ranks([float(self._saw_losses)])
        self._saw_losses = False
        return saw > 0.0

    def told(self) -> dict[str, float]:
        """The bandit's metrics and the share of the rows drawn of each task so far."""
        drawn = self.schedule.drawn()
        return super().told() | {
            f"drawn/{t}": n / max(1, sum(drawn)) for t, n in zip(self.balance.tasks, drawn, strict=True)
        }

    def kept(self) -> dict[str, Any]:
        """The bandit's state and what was drawn."""
        return {"mixture": super().kept(), "schedule": self.schedule.state()}

    def take_back(self, state: dict[str, Any]) -> None:
        """Go on from both."""
        super().take_back(state["mixture"])
        self.schedule.load(state["schedule"])


def refuse_other_tasks(expected: str, given: Mapping[str, Any], tasks: Sequence[str]) -> None:
    """Raise unless a mapping holds each of the tasks and nothing else."""
    if {*given} != {*tasks}:
        raise ValueError(f"{expected} of the tasks {list(tasks)}, found {list(given)}.")


def _refuse(settings: Any) -> None:
    """Raise on what a mixture cannot draw, before the base spends time on the data."""
    if (strategy := getattr(settings, "train_sampling_strategy", "random")) != "random":
        raise ValueError(f"train_sampling_strategy={strategy!r}: the mixture draws the rows itself; expected 'random'.")
    if getattr(settings, "auto_find_batch_size", False):
        raise ValueError("auto_find_batch_size changes how many rows a step draws: expected False with a mixture.")
    if getattr(settings, "ignore_data_skip", False):
        raise ValueError(
            "ignore_data_skip=True reads a resumed epoch from its beginning, whose rows were drawn by the weights of then: "
            "expected False with a mixture."
        )


def _refuse_for_streams(settings: Any) -> None:
    """Raise where rows would be read long before they are trained on, or out of the bandit's sight."""
    if workers := getattr(settings, "dataloader_num_workers", 0):
        raise ValueError(
            f"dataloader_num_workers={workers}: streams are interleaved by the weights of this process; expected 0."
        )
    if getattr(settings, "packing", False):
        raise ValueError("packing=True joins rows of several streams a thousand at a time; expected packing=False.")
    if getattr(settings, "shuffle_dataset", False):
        raise ValueError(
            "shuffle_dataset=True reads streams far ahead of the weights: expected False; shuffle each stream beforehand."
        )
