"""with_mixture: rows drawn by the bandit's weights in the Hugging Face Trainer and TRL's trainers."""

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from counterpoise.multitask import BanditMTL, Uniform, with_mixture
from counterpoise.multitask.drawing import MixtureSampler, Schedule, quotas

from .hf import parameters, tiny_llama, token_rows
from .toy import TASKS


def bandit(**settings):
    return BanditMTL(TASKS, drawn_by="p", **{"rho": 0.5, "eta": 2.0} | settings)


def train(out, *, batch=8, accumulate=1, steps=4, mixture=None, dataset=None, resume=None, mix=None, **kwargs):
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=steps, learning_rate=0.5, optim="sgd", lr_scheduler_type="constant", logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, **{"save_strategy": "no"} | kwargs,
    )  # fmt: skip
    trainer = with_mixture(Trainer)(
        model=tiny_llama(), args=arguments, train_dataset=token_rows() if dataset is None else dataset,
        mixture=mixture or bandit(), **mix or {},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer(tmp_path):
    t = train(tmp_path / "a", steps=6, save_strategy="steps", save_steps=3)
    print(t.state.log_history)
    r = train(tmp_path / "b", steps=6, resume=str(tmp_path / "a" / "checkpoint-3"))
    assert all(map(torch.equal, parameters(t), parameters(r)))
    assert t.mixture.metrics() == r.mixture.metrics()
    assert t.schedule.rounds == r.schedule.rounds
