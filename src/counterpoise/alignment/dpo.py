"""Direct preference optimisation (DPO) through TRL's DPOTrainer, with the same mitigations as RSF and PPO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from counterpoise.alignment.preferences import Preference
from counterpoise.alignment.settings import DPO, rows_at_once
from counterpoise.alignment.training import processes, stepping
from counterpoise.alignment.training.models import frozen_copy
from counterpoise.alignment.training.run import Run
from counterpoise.alignment.training.stepping import Mitigation
from counterpoise.alignment.training.trainers import (
    Bar,
    arguments,
    on_own_gpu,
    quiet_libraries,
    train_quietly,
    trl_for,
    with_pad_token,
)
from counterpoise.evaluation.items import spaced
from counterpoise.language.checkpointing import as_asked
from counterpoise.language.prompts import named
from counterpoise.language.scoring import Example
from counterpoise.language.templates import Refused, fitted, has_template, render
from counterpoise.ranks import is_sharded

HELD = "mitigations.pt"
"""The mitigations' state inside each of TRL's checkpoints."""
METRICS = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
METRICS |= {side: f"rewards/{side}" for side in ("chosen", "rejected")}
"""Names in metrics.jsonl -> TRL's; means over the steps since the last checkpoint."""


def dpo(
    model: nn.Module,
    tokenizer: Any,
    preferences: Sequence[Preference],
    settings: DPO = DPO(),
    *,
    reference: nn.Module | None = None,
    mitigations: Sequence[Mitigation] = (),
    run: Run | None = None,
) -> list[dict[str, float]]:
    """Align `model` in place on preferences.

    loss = -log sigmoid(beta (log p(chosen)/p_ref(chosen) - log p(rejected)/p_ref(rejected))) (Rafailov et al. 2023,
    arXiv 2305.18290, equation 7), AdamW without weight decay, learning rate falling linearly to 0 (TRL's default).
    Runs data-parallel under torchrun or accelerate as TRL does; there every mitigation on weights works, kd and replay do
    not. FSDP and DeepSpeed, which cut the weights up, are refused: neither mitigations nor the writing of the result were
    tried there.

    Args:
        reference: the model of the ratio, PRE; best from `load_frozen`, by default a copy.

    Returns:
        TRL's log lines, one a step.

    Raises:
        ValueError: no end-of-sequence token, no pair that fits, a batch that the processes cannot share, a reward budget
            (there are no samples to score), kd or replay in several processes.
        ModuleNotFoundError: trl is not installed.
    """
    settings.check()
    trl = trl_for("dpo")
    world = refuse_in_dpo(mitigations, settings)
    if is_sharded(model):
        raise ValueError("dpo: expected whole weights, for TRL's loop, found ones that `shard` cut up; leave it out")
    tokenizer = with_pad_token(tokenizer)
    reference = frozen_copy(model) if reference is None else reference
    stepping.start_all(mitigations, model, tokenizer)
    on_cpu = next(model.parameters()).device.type == "cpu"
    steps = math.ceil(len(preferences) / settings.batch_size) * settings.epochs
    with TemporaryDirectory() as scratch, quiet_libraries():
        folder = Path(scratch) if run is None else run.folder / "trainer"
        config = trl.DPOConfig(
            **arguments(settings, model, folder, world),
            beta=settings.beta,
            # Mitigations add losses before the norm is clipped, so the hook clips; TRL clips when there are none.
            max_grad_norm=0.0 if mitigations else stepping.CLIP,
            save_strategy="no" if run is None else "steps",
            save_steps=max(1, math.ceil(steps / settings.saves)),
            save_total_limit=2,  # the older one counts until the newer has the mitigations' state
            ddp_backend="gloo" if on_cpu and world > 1 else None,
        )
        pairs = rows(preferences, tokenizer, chat=settings.chat)
        trainer = trl.DPOTrainer(
            model, ref_model=reference, args=on_own_gpu(config, model), train_dataset=pairs, processing_class=tokenizer
        )
        if not len(trainer.train_dataset):
            raise ValueError(
                f"preferences: expected prompts shorter than {config.max_length} tokens, found none of "
                f"{len(preferences)}; shorten them or raise max_length"
            )
        # TRL's last checkpoint that was written to its end.
        whole = [path.parent for path in folder.glob(f"checkpoint-*/{HELD}")]
        begun = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
        if begun is not None:
            held = torch.load(begun / HELD, map_location="cpu", weights_only=True)
            for mitigation, state in zip(mitigations, held, strict=True):
                mitigation.load_state_dict(state)
        held_back = _Held(trainer, mitigations, tokenizer, run)
        with as_asked(model):
            lines = train_quietly(trainer, held_back, "dpo", resume_from=begun)
    for changed in (model, reference):
        changed.__dict__.pop("forward", None)  # TRL's fused head, which would outlive the training
    model.eval()
    stepping.finish_all(mitigations, model)
    return lines


def rows(preferences: Sequence[Preference], tokenizer: Any, *, chat: bool) -> Any:
    """The pairs as TRL reads them: messages where the tokenizer has a chat template, else text."""
    from datasets import Dataset

    def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
        return [{"role": role, "content": content} for role, content in turns]

    def row(p: Preference) -> dict[str, Any]:
        if not (chat and has_template(tokenizer)):
            sides = {"chosen": p.chosen, "rejected": p.rejected}  # of which reading took the white space
            return {"prompt": p.prompt.text, **{k: spaced(p.prompt.text, said) for k, said in sides.items()}}
        turns = fitted(tokenizer, p.prompt.messages)
        try:
            for said in (p.chosen, p.rejected):
                render(tokenizer, (*turns, ("assistant", said)))  # TRL would name no line
        except Refused as error:
            raise ValueError(f"{named(p.prompt)}: {error}") from None
        chosen, rejected = (messages(("assistant", said)) for said in (p.chosen, p.rejected))
        return {"prompt": messages(*turns), "chosen": chosen, "rejected": rejected}

    return Dataset.from_list([row(p) for p in preferences])


class _Held(Bar):
    """The mitigations' hooks in TRL's training step, and a checkpoint at each of its saves."""

    def __init__(self, trainer: Any, mitigations: Sequence[Mitigation], tokenizer: Any, run: Run | None) -> None:
        super().__init__(None if run is None else run.stage("dpo: steps"))
        self.trainer, self.mitigations, self.tokenizer, self.run = trainer, mitigations, tokenizer, run
        self.step: stepping.Step | None = None
        self.seen: list[Example] = []
        self.loss, trainer.compute_loss = trainer.compute_loss, self.compute_loss

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.seen.clear()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
        """TRL's; remembers the prompts and responses of the step in progress."""
        masks = (inputs["attention_mask"], inputs["completion_mask"])
        for ids, there, said in zip(inputs["input_ids"], *masks, strict=True):
            prompt, response = ids[(there == 1) & (said == 0)], ids[said == 1]
            if len(response):
                self.seen.append(Example(tuple(prompt.tolist()), tuple(response.tolist())))
        return self.loss(model, inputs, *args, **settings)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Losses, clipping, penalties on weights, in the order of `take_step`; once a step, whatever the micro-batches."""
        if not self.mitigations:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        rate = others["optimizer"].param_groups[0]["lr"]
        self.step = stepping.Step(model, list(self.seen), rate, args.per_device_train_batch_size)
        for mitigation in self.mitigations:
            mitigation.add_gradients(self.step)
        torch.nn.utils.clip_grad_norm_(stepping.trainable(model).values(), stepping.CLIP)
        for mitigation in self.mitigations:
            mitigation.before_update(self.step)

    def on_optimizer_step(self, *args: Any, **others: Any) -> None:
        if self.step is not None:
            for mitigation in self.mitigations:
                mitigation.after_update(self.step)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """A checkpoint, a line of metrics, and last what makes TRL's own checkpoint whole."""
        if (run := self.run) is None:
            return
        iteration = math.ceil(state.global_step / args.save_steps)
        processes.on_first(lambda: run.drop_after(iteration - 1))
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        run.save_checkpoint(iteration, model, self.tokenizer, self.mitigations)
        if not state.is_world_process_zero:
            return
        first = (iteration - 1) * args.save_steps
        lines = [line for line in state.log_history if "loss" in line and line["step"] > first]
        told = {ours: sum(line[theirs] for line in lines) / len(lines) for ours, theirs in METRICS.items()}
        run.log(
            {
                "iteration": iteration,
                "method": "dpo",
                "step": state.global_step,
                **told,
                **stepping.told_of(self.mitigations),
            }
        )
        run.mark(iteration, {"step": state.global_step})
        whole = Path(args.output_dir) / f"checkpoint-{state.global_step}" / HELD
        torch.save([m.state_dict() for m in self.mitigations], whole)


def refuse_in_dpo(mitigations: Sequence[Mitigation], settings: DPO) -> int:
    """Raise a ValueError for what TRL's loop has no place for; else how many processes there are."""
    world = processes.started()
    processes.refuse_sharded("dpo", cut_up=False)
    for mitigation in mitigations:
        kind = type(mitigation)
        if kind.stop is not Mitigation.stop:
            raise ValueError(
                "dpo: a reward budget needs samples, which dpo does not draw; use its checkpoints on the way"
            )
        if world > 1 and kind.add_gradients is not Mitigation.add_gradients:
            raise ValueError(
                f"dpo: {kind.__name__} adds a loss of its own, which is not shared among {world} processes; use one "
                "process, or l1, l2, sma, merging, freezing or lora"
            )
    rows_at_once(settings, world)
    return world
