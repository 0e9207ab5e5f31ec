"""`TaxCallback`: the tax during training, in the Hugging Face Trainer and the trainers of TRL."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from counterpoise.evaluation.in_training import Taxes, Watch, logged
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.parts import Part


class TaxCallback(TrainerCallback, ExportableState):
    """Measures abilities on the live model as it is trained, against the model at the start of training.

    Logged as the trainer logs its loss: `tax/NAME` of each ability and `tax/mean`, with `_low` and `_high`, the ends of
    their 95 % intervals (items paired). They are in points: of a hundred for accuracy, exact match and BLEU, hundredths of
    a nat (about 1 % of the probability) for likelihoods. An ability is watched by its first metric in points of a hundred,
    else by its first; another one that its spec names as primary comes before. Training goes on as it would have without the
    callback, bit for bit. Several processes: the first one measures and the others wait.

    With a bound, training stops as soon as a whole interval lies beyond it. Every look that does not stop it is saved as
    one of the trainer's own checkpoints (unless its save_strategy is "no"), which takes the place of the one before; those
    that the trainer writes anyway are looked at first, and stay.

    Args:
        panel: of which the abilities are measured, not the reward; or ability specs (`load_abilities`).
        every: steps of the optimiser.
        trainer: whose reporters (TensorBoard, ...) are told, as a callback is not given it; without it, only its history is.
        at_most: points that an ability may lose: one number for all, or by name.
        part: of the items; held-out ones are best left for the end.
        tokenizer: by default the trainer's processing_class.

    Attributes:
        taxes: of the last look, by ability.
        stopped: why training was stopped, else "".
        kept: {"path", "step"} of the last checkpoint inside the bound.

    Raises:
        ValueError: no ability, a bound that is none; when training starts: weights cut up among processes (FSDP, ZeRO-3).

    Examples:
        >>> trainer.add_callback(TaxCallback(["continue:prose.jsonl"], every=100, trainer=trainer))  # doctest: +SKIP
    """

    def __init__(
        self,
        panel: Panel | Sequence[str],
        *,
        every: int,
        trainer: Trainer | None = None,
        at_most: float | Mapping[str, float] | None = None,
        part: Part = "validation",
        tokenizer: Any = None,
    ) -> None:
        if panel is None:  # what `state` gives: a panel is no json
            raise ValueError(
                "TaxCallback: leave out restore_callback_states_from_checkpoint; its state is restored anyway"
            )
        self._watch, self._tokenizer, self._words = Watch(panel, every, at_most, part), tokenizer, tokenizer
        self._trainer, self._looked, self._replaced = trainer, -1, ""
        self.taxes: Taxes = {}

    stopped = property(lambda self: self._watch.stopped)
    kept = property(lambda self: self._watch.kept)

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the trainer keeps: PRE's scores, so that after a resume they are not of another model."""
        return {"args": {"panel": None, "every": self._watch.every}, "attributes": {"restored": self._watch.state()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure PRE, or read what it scored from the checkpoint that is resumed."""
        if args.report_to and self._trainer is None:
            told = "expected the trainer, to tell its reporters, found none: the taxes go to its history alone"
            warnings.warn(f"TaxCallback: {told}; trainer.add_callback(TaxCallback(..., trainer=trainer))", stacklevel=2)
        self._words = copy.deepcopy(self._tokenizer or kwargs.get("processing_class"))  # measuring may set its padding
        held: Any = state.stateful_callbacks or {}
        stored = held.get(type(self).__name__) or {}
        stored = stored[0] if isinstance(stored, list) else stored
        self._watch.start(kwargs["model"], self._words, state.global_step, stored.get("attributes", {}).get("restored"))
        self._looked, self._replaced, self.taxes = state.global_step, "", {}
        held.setdefault(type(self).__name__, self.state())  # the trainer expects it in a checkpoint that had none

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look, if it is time to or a checkpoint is about to be written."""
        if state.global_step % self._watch.every == 0 or (self._watch.bounds and control.should_save):
            self._look(args, state, control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look, if a checkpoint is about to be written; none is that lies beyond the bound."""
        if self.stopped:
            control.should_save = False
        elif self._watch.bounds and control.should_save and self._looked != state.global_step:
            self._look(args, state, control, kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Drop the checkpoint that this one takes the place of."""
        old, self._replaced = self._replaced, ""
        if (
            old
            and state.is_world_process_zero
            and old not in (state.best_model_checkpoint, self.kept and self.kept["path"])
        ):
            shutil.rmtree(old, ignore_errors=True)

    def _look(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any) -> None:
        self._looked, before = state.global_step, self.kept
        self.taxes = self._watch.look(model, self._words, state.global_step)
        self._log(state, control)
        if self.stopped:
            control.should_training_stop, control.should_save = True, False
        elif self._watch.bounds and args.save_strategy != "no":
            self._replaced = before["path"] if before and before["ours"] else ""
            path = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
            self._watch.kept = {"path": path, "step": state.global_step, "ours": not control.should_save}
            control.should_save = True

    def _log(self, state: TrainerState, control: TrainerControl) -> None:
        logs = logged(self.taxes)
        if self._trainer is None:
            epoch = {} if state.epoch is None else {"epoch": state.epoch}
            state.log_history.append({**logs, **epoch, "step": state.global_step})
            return
        due = control.should_log
        Trainer.log(self._trainer, logs)  # those of TRL's trainers would empty the means that they collect
        control.should_log = due
