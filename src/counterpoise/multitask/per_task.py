"""What the trainers that know each row's task share: its column, each task's losses, logs and checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from counterpoise.checkpoints.files import replacing
from counterpoise.multitask.drawing import no_column, numbered_names, tasks_named, tasks_of
from counterpoise.multitask.own_losses import SPAN, Labels, counted, own_losses
from counterpoise.multitask.weighting import Weighting

ExampleLosses = Callable[[Any, Labels], Tensor]
"""From the model's outputs and the labels to one loss per example, (B,); several label columns come by name."""


class TaskCollator:
    """Takes the task column out of the rows, collates the rest, and puts it back as indices, (B,); with `by_token`, for
    rows that were joined into one sequence, as one index per token, (1, T). Without tasks it only takes the column out.
    """

    def __init__(
        self, inner: Callable[[list[Any]], Any], column: str, tasks: Sequence[str], *, by_token: bool = False
    ) -> None:
        self.inner, self.column, self.tasks, self.by_token = inner, column, tuple(tasks), by_token
        self.numbered: Sequence[str] | None = None  # see `task_indices`; the trainer's, once training begins

    def __call__(self, rows: list[Mapping[str, Any]]) -> Any:
        """The inner collator's batch, with the index of each row's task under the column's name."""
        batch = self.inner([{k: v for k, v in row.items() if k != self.column} for row in rows])
        if not self.tasks or not any(self.column in row for row in rows):  # enough for evaluation
            return batch
        task_B = torch.tensor(tasks_of(rows, self.tasks, self.column, self.numbered), dtype=torch.long)
        if self.by_token and len(ids_1T := batch.get("input_ids", rows)) != len(rows):
            lengths_B = torch.tensor([len(row["input_ids"]) for row in rows])
            lengths_B[-1] += ids_1T.shape[1] - lengths_B.sum()  # padding, whose labels do not count
            task_B = task_B.repeat_interleave(lengths_B).unsqueeze(0)
        batch[self.column] = task_B
        return batch


class PerTask(Trainer):
    """Losses by task in a trainer; the class it is mixed into comes between this one and `Trainer` in the order of
    resolution.
    """

    called: ClassVar[str]
    """The attribute that holds the weighting, the prefix of its logs, and the file of its state in a checkpoint."""

    model: Any
    data_collator: Any

    example_losses: ExampleLosses | None = None
    judged_by: ClassVar[tuple[str, Callable[[list[float]], float]]] = "loss", max
    """What evaluation says of each of several data sets, and which of them is the worst."""

    def __init__(self, *args: Any, balance: Weighting, task_column: str, **kwargs: Any) -> None:
        self.balance, self.task_column = balance, task_column
        setattr(self, self.called, balance)
        self._warned = False
        data = args[3] if len(args) > 3 else kwargs.get("train_dataset")  # their place in every trainer's arguments
        # Before the base maps a stream, which forgets them.
        self.numbered = numbered_names(data, balance.tasks, task_column)
        self._columns = tuple(getattr(data, "column_names", None) or ())  # those that are not used go soon
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(f"found {self.args.n_gpu} GPUs in one process: launch one process per GPU with torchrun.")
        inner = self.accelerator.unwrap_model(self.model)
        self.bare_model: Any = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        self.loss_shifts_labels: bool = getattr(self, "_loss_shifts_labels", False) or _falls_back_to_shifting(
            self.bare_model
        )
        balance.to(self.args.device)
        self.add_callback(_CloseWindow(self))

    def no_column(self, found: Iterable[str]) -> ValueError:
        """The error of rows without their task."""
        return no_column(self.task_column, {*found, *self._columns})

    def window_is_open(self) -> bool:
        """Whether any rank saw a loss since the last optimiser step, the same on every rank."""
        raise NotImplementedError

    def get_train_dataloader(self) -> Any:
        """The base's; numbers in the task column are read as the training data have them."""
        self.numbered = numbered_names(self.train_dataset, self.balance.tasks, self.task_column) or self.numbered
        if isinstance(self.data_collator, TaskCollator):
            self.data_collator.numbered = self.numbered
        found = tasks_named(self.train_dataset, self.balance.tasks, self.task_column, self.numbered)
        self.warn_of_absent([t for t in self.balance.tasks if found and t not in found], "training data")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The base's; a task that only validation has is one, too."""
        with self._without_tasks():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, likewise."""
        with self._without_tasks():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _without_tasks(self) -> Iterator[None]:
        before = self.data_collator
        if isinstance(before, TaskCollator):
            self.data_collator = TaskCollator(before.inner, self.task_column, ())
        try:
            yield
        finally:
            self.data_collator = before

    def warn_of_absent(self, tasks: list[str], where: str) -> None:
        """Say once that tasks have no rows, which a mixture, that draws them, refuses."""
        if tasks and not self._warned and not getattr(self.balance, "samples", False):
            self._warned = True
            warnings.warn(
                f"tasks without a row in the {where}: {tasks}. Their share of the weight trains nothing: leave them out of "
                f"the weighting.",
                stacklevel=2,
            )

    @contextmanager
    def outputs_of(self, model: Any) -> Iterator[list[Any]]:
        """A list of the model's outputs inside the block, each followed by its `own_loss`, which the base may scale."""
        found: list[Any] = []
        hook = self.accelerator.unwrap_model(model).register_forward_hook(
            lambda *call: found.extend((call[2], self.own_loss(call[2])))
        )
        try:
            yield found
        finally:
            hook.remove()

    def own_loss(self, outputs: Any) -> Tensor | None:
        """A copy of the loss in the model's outputs, where the trainer looks for it, without what balances experts."""
        named = isinstance(outputs, Mapping)
        loss = outputs.get("loss") if named else outputs[0] if isinstance(outputs, tuple) else None
        if not isinstance(loss, Tensor) or loss.numel() > 1:
            return None
        loss, routing = loss.detach().clone(), outputs.get("aux_loss") if named else None
        if routing is not None:
            loss -= getattr(self.bare_model, "router_aux_loss_coef", 0.0) * routing.detach().to(loss.device)
        return loss

    def losses_of(self, outputs: Any, labels: Labels, task_B: Tensor) -> Tensor:
        """The loss of every example or token, (B, T), 0 where its label is masked."""
        if self.example_losses is None:
            return own_losses(self.bare_model, outputs, labels, shifts=self.loss_shifts_labels)
        losses_B = self.example_losses(outputs, labels)
        if losses_B.shape != task_B.shape:
            found = tuple(losses_B.shape)
            raise ValueError(f"example_losses: expected one loss per example, {tuple(task_B.shape)}, found {found}.")
        return losses_B.unsqueeze(-1)

    def labels_of(self, inputs: Mapping[str, Any]) -> Labels:
        """The label column, or the columns by name where there are several."""
        names = [n for n in self.label_names or ["labels"] if inputs.get(n) is not None]
        if len(names) == 1:
            return inputs[names[0]]  # type: ignore[no-any-return]
        found = {n: inputs[n] for n in names}
        if self.example_losses is None and set(names) != set(SPAN):
            raise ValueError(
                f"expected one label column, found {names or sorted(inputs)}: {type(self.bare_model).__name__} takes "
                f"{self.label_names or 'none'}. Pass example_losses=..., which gets the columns by name and gives one "
                f"loss per example, (B,)."
            )
        return found

    def counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """How much each label of a micro-batch counts, (B, T); refuses one whose rows were joined."""
        labels, rows = self.labels_of(inputs), len(inputs[self.task_column])
        columns = [labels] if isinstance(labels, Tensor) else list(labels.values())
        if found := [len(x) for x in columns if len(x) != rows]:
            raise ValueError(
                f"{type(self.data_collator.inner).__name__} made {found[0]} row(s) of {rows} examples: joined rows of "
                f"different tasks have one loss, which belongs to none of them. Choose a collator that pads."
            )
        if self.example_losses is not None:
            return torch.ones(rows, 1, device=inputs[self.task_column].device)
        length = inputs["input_ids"].shape[1] if not isinstance(labels, Tensor) else 0
        return counted(self.bare_model, labels, shifts=self.loss_shifts_labels, length=length)

    def by_task(self, values_BT: Tensor, task_B: Tensor) -> Tensor:
        """The values summed by task, (m,); tasks one per row, or one per token (its label is the next one's)."""
        if task_B.dim() > 1:
            values_BT, task_B = values_BT.flatten(), task_B[:, -values_BT.shape[1] :].flatten()
        else:
            values_BT = values_BT.sum(-1)
        return values_BT.new_zeros(len(self.balance.tasks)).index_add(0, task_B.to(values_BT.device), values_BT)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The base's, without the task column."""
        if isinstance(inputs, Mapping):
            inputs = {k: v for k, v in inputs.items() if k != self.task_column}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The base's; with a mapping of data sets by name also the worst of them, `eval_worst_loss`, which callbacks are
        told of as well. It is NaN, with a warning, where one of them has no number."""
        found: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        prefix = kwargs.get("metric_key_prefix", "eval")
        what, worst = self.judged_by
        keys = {name: f"{prefix}_{name}_{what}" for name in sets} if isinstance(sets, dict) else {}
        if any(key in found for key in keys.values()):
            values = {name: math.nan if found.get(key) is None else found[key] for name, key in keys.items()}
            if lacking := [name for name, value in values.items() if math.isnan(value)]:
                warnings.warn(f"evaluation: expected a {what} of each data set, found none of {lacking}.", stacklevel=2)
            joined = {f"{prefix}_worst_{what}": math.nan if lacking else worst([*values.values()])}
            self.log(dict(joined))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, joined)
            found |= joined
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The base's; training logs carry the weighting's metrics."""
        if "loss" in logs:
            logs = logs | {f"{self.called}/{name}": value for name, value in self.told().items()}
        super().log(logs, *args, **kwargs)

    def told(self) -> dict[str, float]:
        """What a training log carries."""
        return self.balance.metrics()

    def kept(self) -> dict[str, Any]:
        """What a checkpoint holds beside the base's."""
        return self.balance.state_dict()

    def take_back(self, state: dict[str, Any]) -> None:
        """Go on from what `kept` gave."""
        self.balance.load_state_dict(state)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The base's, and the weighting's state beside it."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            with replacing(Path(output_dir or self.args.output_dir or ".") / f"{self.called}.pt") as partial:
                torch.save(self.kept(), partial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / f"{self.called}.pt"
        if not path.exists():
            raise FileNotFoundError(
                f"expected the {self.called}'s state at {path}, found none: the checkpoint was written by a trainer "
                f"without a {self.called}. Resume it with that trainer, or start from its weights."
            )
        self.take_back(torch.load(path, map_location="cpu", weights_only=True))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        if columns is not None and self.task_column not in columns:
            self._signature_columns = [*columns, self.task_column]


class _CloseWindow(TrainerCallback):
    """Moves the weights after each optimiser step, before anything is logged or saved."""

    def __init__(self, trainer: PerTask) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget a window that an error left open: `auto_find_batch_size` begins again."""
        self.trainer.balance.discard()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Close the window, unless no rank had a label in it; the trainer zeroes the model's gradients only."""
        if self.trainer.window_is_open():
            self.trainer.balance.step()
        self.trainer.balance.zero_grad()

    def on_epoch_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """Say which tasks never came, where the data did not say so beforehand."""
        balance = self.trainer.balance
        if state.epoch >= 1:
            unseen = [t for t, x in zip(balance.tasks, balance.last_losses, strict=True) if math.isnan(x)]
            self.trainer.warn_of_absent(unseen, "first epoch, or none with a label")


def _falls_back_to_shifting(model: Any) -> bool:
    """Whether a model without a loss type of its own (GPT2LMHeadModel) computes the shifted loss, by transformers' default."""
    if not type(model).__name__.endswith("LMHeadModel") or getattr(model.config, "is_encoder_decoder", False):
        return False
    return getattr(model.loss_function, "__name__", "") == "ForCausalLMLoss"


def loss_owner(classes: Sequence[type]) -> type:
    """Of a trainer's classes, in the order of resolution, that whose loss is trained."""
    return next(c for c in classes if "compute_loss" in vars(c) and not issubclass(c, PerTask))


def subclass_of(base: Any, overrides: type, called: str, does: str) -> type:
    """A subclass of a trainer class with overrides before it."""
    if not (isinstance(base, type) and issubclass(base, Trainer)):
        raise TypeError(f"expected a trainer class, such as Trainer or SFTTrainer itself, found {base!r:.80}.")
    return type(f"{called}{base.__name__}", (overrides, base), {"__doc__": f"{base.__name__} with {does}."})


def refuse_own_loss(classes: Sequence[type], example_losses: ExampleLosses | None, instead: str) -> None:
    """Raise when a trainer's loss is not a mean over rows that the model says: it would be dropped for another."""
    owner = loss_owner(classes)
    known, theirs = owner.__name__ in ("Trainer", "SFTTrainer"), owner.__module__.partition(".")[0]
    if known and theirs in ("transformers", "trl"):
        return
    if theirs == "trl":
        raise ValueError(
            f"{owner.__name__} has no loss per row: it compares pairs, samples or models, in a loss of its own. Expected "
            f"Trainer or SFTTrainer{instead}."
        )
    if example_losses is None:
        raise ValueError(
            f"{owner.__name__} computes a loss of its own (compute_loss), which a task weighting cannot take apart: pass "
            f"example_losses=... (outputs and labels to one loss per row), or leave compute_loss to Trainer."
        )
