"""Tasks drawn by a bandit's weights inside the Hugging Face Trainer and TRL's SFT, GRPO and RLOO trainers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from counterpoise.multitask.drawing import as_stream
from counterpoise.multitask.mixing import Mixed
from counterpoise.multitask.own_losses import Labels, own_losses, refuse_another_loss
from counterpoise.multitask.per_task import ExampleLosses, TaskCollator, loss_owner, refuse_own_loss, subclass_of
from counterpoise.multitask.reward_mixture import MixedRewards
from counterpoise.ranks import world_size


def with_mixture(base: type) -> type:
    """A subclass of a trainer class whose rows are drawn, task by task, by the weights of a bandit.

    Each optimiser step's rows are split among the tasks by p, to whole numbers; within a task all rows come, in a random
    order, before one comes again. The loss and the gradients are the base's. After each step p moves on the tasks' mean
    losses (plain ones, with label smoothing and SFT's "dft", too), or in GRPOTrainer and RLOOTrainer on 1 - mean reward,
    with rewards brought to [0, 1]. Draws are keyed by the arguments' `data_seed` or `seed`, and what was drawn is in every
    checkpoint (`mixture.pt`): a resumed run goes on bit for bit (in GRPO and RLOO from where a generation ends, as TRL's
    own does). Data loaders read ahead, so that the weights of a step reach the rows a step later; with workers several
    (a warning says how many). An epoch has as many rows as the data.

    Training data are one data set with a column that names each row's task, or a mapping from tasks to data sets. Those
    may be streams (`datasets.IterableDataset`): they are interleaved, and one that ends begins anew. With packing each
    packed sequence holds rows of one task.

    The class takes, beside the base's arguments:
        mixture: `BanditMTL(tasks, drawn_by="p", ...)`; with rho=0 the tasks are drawn by its prior throughout.
        task_column: the column with the task's name or index; "task" by default. A `datasets.ClassLabel` is read by its
            names.
        reference: a loss for each task; p moves on what is above it, as DoReMi's excess loss (Xie et al., NeurIPS 2023;
            it takes the excess of each token, here that of the mean).
        improvement: how much the change of a task's level since it was last seen counts beside the level: the 1 / lambda
            of MT-GRPO (Ramesh et al., 2602.05547), whose weights descend on change of reward + lambda * reward.
        example_losses: Trainer only, see `with_weighting`; p then moves on them, whatever is trained.
        reward_bounds: GRPO, RLOO: the smallest and the largest total reward, one scale for all tasks, or such a pair for
            each task, by name; by default the smallest and the largest of all seen so far. Logs have
            `mixture/given_low` (and `/TASK`) or `mixture/seen_low`.
        make_up: GRPO, RLOO: draw by p over the share of each task's groups with an advantage (not all rewards equal), so
            that these come by p on average. By default where p moves; with rho=0 the prompts are drawn by the prior.
        oversample: GRPO, RLOO: draw so many times the prompts, drop groups without any advantage, and fill each task's
            quota of p from the others. At 1 nothing is dropped.

    Raises:
        TypeError, ValueError: no bandit with drawn_by="p", a trainer whose loss is none per row, data without the column
            or without rows of a task, another way of sampling, streams read by workers, packed or shuffled in a buffer; a
            model or a compute_loss_func with another loss than its head suggests, without example_losses.

    Examples:
        >>> from transformers import Trainer
        >>> with_mixture(Trainer).__name__
        'MixedTrainer'
    """
    overrides = MixedRewards if hasattr(base, "_calculate_rewards") else _MixedLosses
    return subclass_of(base, overrides, "Mixed", "a mixture of tasks")


class _MixedLosses(Mixed):
    """Levels are mean losses."""

    _prepared = False

    def __init__(self, *args: Any, example_losses: ExampleLosses | None = None, **kwargs: Any) -> None:
        if wrong := [name for name in ("reward_bounds", "oversample", "make_up") if name in kwargs]:
            raise ValueError(f"{wrong[0]} is for GRPOTrainer and RLOOTrainer, which have rewards: leave it out.")
        refuse_own_loss(type(self).__mro__, example_losses, ", GRPOTrainer or RLOOTrainer")
        # TRL's SFTTrainer computes the loss itself, from log-probabilities.
        of_trl = loss_owner(type(self).__mro__).__module__.startswith("trl.")
        if example_losses is not None and of_trl:
            raise ValueError(
                "example_losses is for Trainer: in SFTTrainer the model gives log-probabilities and no logits, and p moves "
                "on the mean loss of their tokens. Leave it out."
            )
        self.example_losses, self._compared_with_own = example_losses, example_losses is not None or of_trl
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None and example_losses is None:
            raise ValueError(
                "compute_loss_func gives one loss for the batch, and p would move on another: with Trainer pass "
                "example_losses=... (outputs and labels to one loss per row), or leave it out."
            )
        self.data_collator: Any = TaskCollator(
            self.data_collator, self.task_column, self.balance.tasks, by_token=example_losses is None
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The base's; in training the losses by task are observed on the way."""
        inputs = dict(inputs)
        if not self.model.training:
            inputs.pop(self.task_column, None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.task_column not in inputs:
            raise self.no_column(inputs)
        labels, counted_BT, task_B = self.labels_of(inputs), self.counted(inputs), inputs.pop(self.task_column)
        with self.outputs_of(model) as found:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with torch.no_grad():
            losses_BT = self.losses_of(found[0], labels, task_B)
            if not self._compared_with_own:
                items = num_items_in_batch if self.model_accepts_loss_kwargs else None
                self._compare_with_own(model, inputs, labels, found[1], losses_BT, counted_BT, items)
        self.observe(self.by_task(losses_BT, task_B), self.by_task(counted_BT, task_B))
        return loss

    def _compare_with_own(
        self,
        model: Any,
        inputs: Any,
        labels: Labels,
        own: Tensor | None,
        losses_BT: Tensor,
        counted_BT: Tensor,
        items: Any,
    ) -> None:
        """Raise when the model's own loss of the first batch is another than is observed: p would not move on what is
        trained. `items`: what it was told to divide by instead of the number of labels."""
        total, count = losses_BT.sum(), counted_BT.sum()
        if not count or (not isinstance(labels, Tensor) and count < len(counted_BT)):
            return  # no label, or spans of which some ends are masked: the means of both differ then
        self._compared_with_own = True
        try:
            refuse_another_loss(self.bare_model, own, total / (count if items is None else items))
        except ValueError:
            refuse_another_loss(self.bare_model, own, total / count)  # a loss that makes nothing of `items`
            if items is None or world_size() > 1:  # several processes run the model together or not at all
                return
            inner = self.accelerator.unwrap_model(model).eval()  # draws no random number
            with self.compute_loss_context_manager():
                again = inner(**inputs)
            inner.train()
            losses_BT = own_losses(self.bare_model, again, labels, shifts=self.loss_shifts_labels)
            refuse_another_loss(self.bare_model, self.own_loss(again), losses_BT.sum() / count)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any) -> Any:
        """SFTTrainer's; of each stream alone, as it filters, and packs the rows of each task on their own."""
        prepare = super()._prepare_dataset  # type: ignore[misc]
        training, self._prepared = not self._prepared, True  # SFTTrainer prepares the training data first
        if not training:
            rows = dataset.remove_columns([c for c in dataset.column_names or () if c == self.task_column])
            return prepare(rows, processing_class, args, packing, *rest)
        if self.streams is not None:
            streams = {t: as_stream(x) for t, x in self.streams.items()}
            return self.interleaved(
                {t: prepare(x, processing_class, args, packing, *rest) for t, x in streams.items()}, self.task_column
            )
        if not packing or self.task_column not in (dataset.column_names or ()):
            return prepare(dataset, processing_class, args, packing, *rest)
        from datasets import concatenate_datasets

        rows = zip(self.balance.tasks, self._rows_of_tasks(dataset), strict=True)
        packed = {t: prepare(dataset.select(r), processing_class, args, packing, *rest) for t, r in rows if r}
        return concatenate_datasets([x.add_column(self.task_column, [t] * len(x)) for t, x in packed.items()])
