"""The weightings inside the Hugging Face Trainer and TRL's SFTTrainer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback

from counterpoise.checkpoints.files import replacing
from counterpoise.multitask.own_losses import SPAN, Labels, counted, own_losses, refuse_another_loss
from counterpoise.multitask.weighting import Weighting
from counterpoise.ranks import sum_over_ranks, world_size

STATE_FILE = "weighting.pt"
"""The weighting's state inside each checkpoint."""

ExampleLosses = Callable[[Any, Labels], Tensor]
"""From the model's outputs and the labels to one loss per example, (B,); several label columns come by name."""


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
        TypeError: no `Weighting`, which an adversarial one is not: it needs features that the trainer does not pass on.

    Examples:
        >>> WeightedTrainer = with_weighting(Trainer)
        >>> WeightedTrainer.__name__
        'WeightedTrainer'
    """
    return type(f"Weighted{base.__name__}", (_Weighted, base), {"__doc__": f"{base.__name__} with a task weighting."})


class TaskCollator:
    """Takes the task column out of the rows, collates the rest, and puts it back as indices, (B,)."""

    def __init__(self, inner: Callable[[list[Any]], Any], column: str, tasks: Sequence[str]) -> None:
        self.inner, self.column = inner, column
        self.index = {task: i for i, task in enumerate(tasks)}

    def __call__(self, rows: list[Mapping[str, Any]]) -> Any:
        """The inner collator's batch, with the index of each row's task under the column's name."""
        batch = self.inner([{k: v for k, v in row.items() if k != self.column} for row in rows])
        if not any(self.column in row for row in rows):  # enough for evaluation
            return batch
        batch[self.column] = torch.tensor([self._task(row) for row in rows], dtype=torch.long)
        return batch

    def _task(self, row: Mapping[str, Any]) -> int:
        if self.column not in row:
            raise _no_column(self.column, row)
        task = row[self.column]
        if isinstance(task, str) and task in self.index:
            return self.index[task]
        if not isinstance(task, str) and 0 <= int(task) < len(self.index):
            return int(task)
        raise ValueError(f"column {self.column!r} holds {task!r}, expected one of {list(self.index)} or its index.")


class _Weighted(Trainer):
    """The overrides; the class they are mixed into comes between this one and `Trainer` in the order of resolution."""

    model: Any

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
        _refuse(settings, kwargs | {"data_collator": collator}, weighting)
        _refuse_own_loss(type(self).__mro__, example_losses)
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):
            raise ImportError("with_weighting needs Trainer.loss_is_scaled_for_ga: upgrade transformers.")
        self.weighting, self.task_column, self.example_losses = weighting, task_column, example_losses
        self._micro_counts: deque[list[float]] = deque()
        self._window_counts: list[float] = []
        self._compared_with_own = example_losses is not None
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(f"found {self.args.n_gpu} GPUs in one process: launch one process per GPU with torchrun.")
        self.loss_is_scaled_for_ga = True
        inner = self.accelerator.unwrap_model(self.model)
        self._inner: Any = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        self._loss_shifts_labels: bool = self._loss_shifts_labels or _falls_back_to_shifting(self._inner)
        self.data_collator: Any = TaskCollator(self.data_collator, task_column, weighting.tasks)
        weighting.to(self.args.device)
        weighting.averages_gradients = False
        self.add_callback(_CloseWindow(weighting, lambda: any(self._window_counts)))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted loss in training; the base's own in evaluation."""
        inputs = dict(inputs)
        task_B = inputs.pop(self.task_column, None)
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = self._labels(inputs)
        found: list[Any] = []
        inner = self.accelerator.unwrap_model(model)
        hook = inner.register_forward_hook(lambda *call: found.append(call[2]))
        try:
            # The base runs the model and keeps its own metrics; its loss, the unweighted one, is dropped.
            super().compute_loss(model, inputs, num_items_in_batch=None)
        finally:
            hook.remove()
        routing = getattr(found[0], "aux_loss", None)  # of a mixture of experts, as the model weighs it
        if routing is not None:
            routing = getattr(inner, "router_aux_loss_coef", 0.0) * routing
        loss = self._weighted_loss(found[0], labels, task_B, routing)
        if routing is not None:
            loss = loss + routing.to(loss.device) / self.current_gradient_accumulation_steps
        return (loss, found[0]) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of one optimiser step, with each task's share of them counted."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if lacking := next((b for b in batches if self.task_column not in b), None):
            raise _no_column(self.task_column, lacking)
        m = len(self.weighting.tasks)
        counts = [_per_task(self._counted(b).sum(-1), b[self.task_column], m) for b in batches]
        self._micro_counts = deque(torch.stack(counts).tolist() if counts else [])
        self._window_counts = sum_over_ranks([sum(c) for c in zip(*self._micro_counts, strict=True)] or [0.0] * m)
        return batches, num_items

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The base's, without the task column."""
        inputs = {k: v for k, v in inputs.items() if k != self.task_column}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, with the weighting's own parameters if it has any."""
        optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if own := [p for p in self.weighting.parameters() if p.requires_grad and id(p) not in known]:
            optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The base's; training logs carry the weighting's metrics."""
        if "loss" in logs:
            logs = logs | {f"weighting/{name}": value for name, value in self.weighting.metrics().items()}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The base's, and the weighting's state beside it."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            with replacing(Path(output_dir or self.args.output_dir or ".") / STATE_FILE) as partial:
                torch.save(self.weighting.state_dict(), partial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"expected the weighting's state at {path}, found none: the checkpoint was written by a trainer "
                f"without a weighting. Resume it with that trainer, or start from its weights."
            )
        self.weighting.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        if columns is not None and self.task_column not in columns:
            self._signature_columns = [*columns, self.task_column]

    def _weighted_loss(self, outputs: Any, labels: Labels, task_B: Tensor, routing: Tensor | None) -> Tensor:
        counts = self._micro_counts.popleft()
        if self.example_losses is not None:
            losses_BT = self.example_losses(outputs, labels)
            if losses_BT.shape != task_B.shape:
                found = tuple(losses_BT.shape)
                raise ValueError(
                    f"example_losses: expected one loss per example, {tuple(task_B.shape)}, found {found}."
                )
            losses_BT = losses_BT.unsqueeze(-1)
        else:
            losses_BT = own_losses(self._inner, outputs, labels, shifts=self._loss_shifts_labels)
        if not any(counts):  # every label of this micro-batch is masked: a differentiable zero
            return losses_BT.sum() * 0.0
        spans_masked = not isinstance(labels, Tensor) and sum(counts) < len(task_B)  # their means differ by end
        if not self._compared_with_own and not spans_masked:
            self._compared_with_own = True
            own = getattr(outputs, "loss", None)
            own = own if own is None or routing is None else own.detach() - routing.detach().to(own.device)
            refuse_another_loss(self._inner, own, losses_BT.detach().sum() / sum(counts))
        sums_M = _per_task(losses_BT.sum(-1), task_B, len(counts))
        means_M = sums_M / sums_M.new_tensor(counts).clamp(min=1.0)
        return self.weighting(means_M, counts, self._window_counts)  # type: ignore[no-any-return]

    def _labels(self, inputs: Mapping[str, Any]) -> Labels:
        """The label column, or the columns by name where there are several."""
        names = [n for n in self.label_names or ["labels"] if inputs.get(n) is not None]
        if len(names) == 1:
            return inputs[names[0]]  # type: ignore[no-any-return]
        found = {n: inputs[n] for n in names}
        if self.example_losses is None and set(names) != set(SPAN):
            raise ValueError(
                f"expected one label column, found {names or sorted(inputs)}: {type(self._inner).__name__} takes "
                f"{self.label_names or 'none'}. Pass example_losses=..., which gets the columns by name and gives one "
                f"loss per example, (B,)."
            )
        return found

    def _counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """How much each label of a micro-batch counts, (B, T); refuses one whose rows were joined."""
        labels, rows = self._labels(inputs), len(inputs[self.task_column])
        columns = [labels] if isinstance(labels, Tensor) else list(labels.values())
        if found := [len(x) for x in columns if len(x) != rows]:
            raise ValueError(
                f"{type(self.data_collator.inner).__name__} made {found[0]} row(s) of {rows} examples: joined rows of "
                f"different tasks have one loss, which belongs to none of them. Choose a collator that pads."
            )
        if self.example_losses is not None:
            return torch.ones(rows, 1, device=inputs[self.task_column].device)
        length = inputs["input_ids"].shape[1] if not isinstance(labels, Tensor) else 0
        return counted(self._inner, labels, shifts=self._loss_shifts_labels, length=length)


class _CloseWindow(TrainerCallback):
    """Moves the weights after each optimiser step, before anything is logged or saved."""

    def __init__(self, weighting: Weighting, opened: Callable[[], bool]) -> None:
        self.weighting, self.opened = weighting, opened

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget a window that an error left open: `auto_find_batch_size` begins again."""
        self.weighting.discard()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Average the gradients of the weighting's own parameters, which no DDP wraps."""
        if world_size() > 1:
            for parameter in self.weighting.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Close the window, unless no rank had a label in it; the trainer zeroes the model's gradients only."""
        if self.opened():
            self.weighting.step()
        self.weighting.zero_grad()


def _falls_back_to_shifting(model: Any) -> bool:
    """Whether a model without a loss type of its own (GPT2LMHeadModel) computes the shifted loss, by transformers' default."""
    if not type(model).__name__.endswith("LMHeadModel") or getattr(model.config, "is_encoder_decoder", False):
        return False
    return getattr(model.loss_function, "__name__", "") == "ForCausalLMLoss"


def _no_column(column: str, found: Iterable[str]) -> ValueError:
    return ValueError(
        f"expected a column {column!r} that names each row's task, found only {sorted(found)}: add it to the data set, "
        f"or pass task_column=..."
    )


def _per_task(values_B: Tensor, task_B: Tensor, m: int) -> Tensor:
    return values_B.new_zeros(m).index_add(0, task_B.to(values_B.device), values_B)


def _refuse_own_loss(classes: Sequence[type], example_losses: ExampleLosses | None) -> None:
    """Raise when a trainer's loss is not a mean over rows that the model says: it would be dropped for another."""
    owner = next(c for c in classes if "compute_loss" in vars(c) and c is not _Weighted)
    known, theirs = owner.__name__ in ("Trainer", "SFTTrainer"), owner.__module__.partition(".")[0]
    if known and theirs in ("transformers", "trl"):
        return
    if theirs == "trl":
        raise ValueError(
            f"{owner.__name__} has no loss per row: it compares pairs, samples or models, in a loss of its own. Expected "
            f"Trainer or SFTTrainer; to balance its tasks choose the rows, with BanditMTL(..., drawn_by='p')."
        )
    if example_losses is None:
        raise ValueError(
            f"{owner.__name__} computes a loss of its own (compute_loss), which a task weighting cannot take apart: pass "
            f"example_losses=... (outputs and labels to one loss per row), or leave compute_loss to Trainer."
        )


def _refuse(settings: Any, kwargs: Mapping[str, Any], weighting: Weighting) -> None:
    """Raise on what would give wrong task losses, before the base trainer spends time on the data."""
    if not isinstance(weighting, Weighting):
        raise TypeError(
            f"weighting must be a counterpoise.multitask.Weighting, found {type(weighting).__name__}. An adversarial "
            f"weighting needs each example's shared features, which the trainer does not pass on: train it in a loop of "
            f"your own."
        )
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
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func gives one loss for the batch: pass example_losses=..., one per example.")
    steps = getattr(settings, "gradient_accumulation_steps", 1)
    if weighting.whole_batch_only and steps > 1:
        raise ValueError(
            f"{type(weighting).__name__} needs the whole batch in one call, found gradient_accumulation_steps={steps}: "
            f"expected 1."
        )
