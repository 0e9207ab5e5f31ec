"""The weightings inside the Hugging Face Trainer and TRL's SFTTrainer."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback

from counterpoise.multitask.own_losses import Labels, refuse_another_loss
from counterpoise.multitask.per_task import ExampleLosses, PerTask, TaskCollator, refuse_own_loss, subclass_of
from counterpoise.multitask.weighting import Weighting
from counterpoise.ranks import sum_over_ranks, world_size


def with_weighting(base: type) -> type:
    """A subclass of a trainer class whose task losses are weighted.

    The data set gets a column that names each row's task. One forward pass per micro-batch gives the loss of every
    example, split by task: means over tokens for language models (as the trainers have it with `num_items_in_batch`),
    over examples for classifiers, regressors and question answering. Which loss that is the model says (its class,
    `problem_type`, `num_labels`), and the first batch is compared with the model's own. The window's counts are given
    to the weighting before its first backward pass, so accumulation steps and processes give the gradients of the one
    big batch. The weights are saved in every checkpoint (`weighting.pt`), restored bit for bit on resume, and logged as
    `weighting/...`. Evaluation is unweighted.

    The class takes, beside the base's arguments:
        weighting: any weighting of this package.
        task_column: the column with the task's name or index; "task" by default.
        example_losses: for a model whose loss is neither causal language modeling, nor token or sequence
            classification, regression or question answering: outputs and labels to one loss per example. Several
            label columns come as a mapping by name.

    Raises:
        ValueError: another trainer of TRL's than SFTTrainer (DPO, KTO, GRPO and the like have no loss per row), or a
            compute_loss of one's own without example_losses; packing or padding-free batches (rows of different tasks
            are joined), by a setting, a collator or as found in a batch; a model whose own loss is another one, or that
            takes several label columns, without example_losses; label smoothing, a custom compute_loss_func, several
            GPUs in one process, a training set without the task column, a task column that names unknown tasks.
        TypeError: no `Weighting`.

    Examples:
        >>> WeightedTrainer = with_weighting(Trainer)
        >>> WeightedTrainer.__name__
        'WeightedTrainer'
    """
    return subclass_of(base, _Weighted, "Weighted", "a task weighting")


class _Weighted(PerTask):
    """The overrides of `with_weighting`."""

    called = "weighting"

    def __init__(
        self,
        *args: Any,
        weighting: Weighting,
        task_column: str = "task",
        example_losses: ExampleLosses | None = None,
        **kwargs: Any,
    ) -> None:
        settings = kwargs.get("args", args[1] if len(args) > 1 else None)
        collator = kwargs.get("data_collator", args[2] if len(args) > 2 else None)
        refuse_own_loss(
            type(self).__mro__,
            example_losses,
            "; to balance its tasks choose the rows, with BanditMTL(..., drawn_by='p')",
        )
        _refuse(settings, kwargs | {"data_collator": collator}, weighting)
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):
            raise ImportError("with_weighting needs Trainer.loss_is_scaled_for_ga: upgrade transformers.")
        self._micro_counts: deque[list[float]] = deque()
        self._window_counts: list[float] = []
        self.example_losses, self._compared_with_own = example_losses, example_losses is not None
        super().__init__(*args, balance=weighting, task_column=task_column, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func gives one loss for the batch: pass example_losses=..., one per example."
            )
        self.loss_is_scaled_for_ga = True
        self.data_collator: Any = TaskCollator(self.data_collator, task_column, weighting.tasks)
        weighting.averages_gradients = False
        self.add_callback(_AverageGradients(weighting))

    def window_is_open(self) -> bool:
        """Whether any rank had a label in this window."""
        return any(self._window_counts)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted loss in training; the base's own in evaluation."""
        inputs = dict(inputs)
        task_B = inputs.pop(self.task_column, None)
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = self.labels_of(inputs)
        with self.outputs_of(model) as found:
            # The base runs the model and keeps its own metrics; its loss, the unweighted one, is dropped.
            super().compute_loss(model, inputs, num_items_in_batch=None)
        routing = getattr(found[0], "aux_loss", None)  # of a mixture of experts, as the model weighs it
        if routing is not None:
            inner = self.accelerator.unwrap_model(model)
            routing = getattr(inner, "router_aux_loss_coef", 0.0) * routing
        loss = self._weighted_loss(found[0], labels, task_B, routing)
        if routing is not None:
            loss = loss + routing.to(loss.device) / self.current_gradient_accumulation_steps
        return (loss, found[0]) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of one optimiser step, with each task's share of them counted."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if lacking := next((b for b in batches if self.task_column not in b), None):
            raise self.no_column(lacking)
        m = len(self.balance.tasks)
        counts = [self.by_task(self.counted(b), b[self.task_column]) for b in batches]
        self._micro_counts = deque(torch.stack(counts).tolist() if counts else [])
        self._window_counts = sum_over_ranks([sum(c) for c in zip(*self._micro_counts, strict=True)] or [0.0] * m)
        return batches, num_items

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, with the weighting's own parameters if it has any."""
        optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if own := [p for p in self.balance.parameters() if p.requires_grad and id(p) not in known]:
            optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        return optimizer

    def _weighted_loss(self, outputs: Any, labels: Labels, task_B: Tensor, routing: Tensor | None) -> Tensor:
        counts = self._micro_counts.popleft()
        losses_BT = self.losses_of(outputs, labels, task_B)
        if not any(counts):  # every label of this micro-batch is masked: a differentiable zero
            return losses_BT.sum() * 0.0
        spans_masked = not isinstance(labels, Tensor) and sum(counts) < len(task_B)  # their means differ by end
        if not self._compared_with_own and not spans_masked:
            self._compared_with_own = True
            own = getattr(outputs, "loss", None)
            own = own if own is None or routing is None else own.detach() - routing.detach().to(own.device)
            refuse_another_loss(self.bare_model, own, losses_BT.detach().sum() / sum(counts))
        sums_M = self.by_task(losses_BT, task_B)
        means_M = sums_M / sums_M.new_tensor(counts).clamp(min=1.0)
        return self.balance(means_M, counts, self._window_counts)  # type: ignore[no-any-return]


class _AverageGradients(TrainerCallback):
    """Averages the gradients of the weighting's own parameters, which no DDP wraps."""

    def __init__(self, weighting: Weighting) -> None:
        self.weighting = weighting

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Every rank has the same number of parameters, with or without a gradient."""
        if world_size() > 1:
            for parameter in self.weighting.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()


def _refuse(settings: Any, kwargs: Mapping[str, Any], weighting: Weighting) -> None:
    """Raise on what would give wrong task losses, before the base trainer spends time on the data."""
    if not isinstance(weighting, Weighting):
        raise TypeError(f"weighting must be a counterpoise.multitask.Weighting, found {type(weighting).__name__}.")
    for name in ("packing", "padding_free"):
        if getattr(settings, name, False):
            raise ValueError(
                f"{name}=True joins rows of different tasks into one sequence, whose loss then belongs to none of "
                f"them: expected {name}=False with a task weighting. Group the rows by length if padding is the worry."
            )
    collator = kwargs.get("data_collator")
    if isinstance(collator, DataCollatorWithFlattening) or getattr(collator, "padding_free", False):
        raise ValueError(
            f"{type(collator).__name__} joins rows of different tasks into one sequence, whose loss then belongs to none "
            f"of them: expected a collator that pads, such as DataCollatorForSeq2Seq."
        )
    if getattr(settings, "label_smoothing_factor", 0.0):
        raise ValueError("label_smoothing_factor is not supported with a task weighting: expected 0.")
    if getattr(settings, "loss_type", "nll") != "nll":
        raise ValueError(f"loss_type={settings.loss_type!r} is not supported with a task weighting: expected 'nll'.")
    steps = getattr(settings, "gradient_accumulation_steps", 1)
    if weighting.whole_batch_only and steps > 1:
        raise ValueError(
            f"{type(weighting).__name__} needs the whole batch in one call, found gradient_accumulation_steps={steps}: "
            f"expected 1."
        )
