"""A tiny Llama, rows of three tasks, and one call that trains it with a weighting."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from counterpoise.multitask import BanditMTL, Weighting, with_mixture, with_weighting

from .toy import TASKS


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=16, **size, **heads))


def token_rows(count: int = 32, labelled: int = 32) -> Dataset:
    """Random tokens; the tasks differ in how many labels are masked, and in size. Later rows have no label at all."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        tokens = torch.randint(0, 32, (8,), generator=generator).tolist()
        task = (i * i) % 3 if i % 4 else 2
        masked = 2 * task if i < labelled else 8
        labels = [-100] * masked + tokens[masked:]
        rows.append({"input_ids": tokens, "labels": labels, "attention_mask": [1] * 8, "task": TASKS[task]})
    return Dataset.from_list(rows)


def train(
    out: str, *, batch: int, accumulate: int = 1, steps: int = 4, weighting: Weighting | None = None, **kwargs: Any
) -> Any:
    """The trainer after training; extra arguments go to TrainingArguments, but for resume, base, model, dataset and
    mixture, which draws the rows instead of weighting them."""
    dataset = kwargs.pop("dataset", None) or token_rows()
    mixture = kwargs.pop("mixture", None)
    resume, base, model = kwargs.pop("resume", None), kwargs.pop("base", Trainer), kwargs.pop("model", None)
    arguments = TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no"} | kwargs,
    )
    given = {"model": model or tiny_llama(), "args": arguments, "train_dataset": dataset}
    if mixture is None:
        given["weighting"] = weighting or BanditMTL(TASKS, min_effective_tasks=1.5)
        trainer = with_weighting(base)(**given)
    else:
        trainer = with_mixture(base)(mixture=mixture, **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(trainer: Any) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]
