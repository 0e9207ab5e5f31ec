"""Evaluation by task: data sets without a number, early stopping by the worst, tasks of validation alone, other inputs."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from counterpoise.multitask import with_mixture

from .hf import tiny_llama, token_rows, train
from .mixtures import COMMON, bandit, run, texts
from .toy import TASKS


def evaluated(tmp_path, held, callbacks=(), **settings):
    settings = {"max_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 8} | settings
    trainer = with_mixture(Trainer)(
        model=tiny_llama(), mixture=bandit(), train_dataset=token_rows(), eval_dataset=held, callbacks=list(callbacks),
        args=TrainingArguments(str(tmp_path), **COMMON | settings),
    )  # fmt: skip
    trainer.train()
    return trainer


def masked():
    return token_rows(8).map(lambda row: {"labels": [-100] * 8})


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("without", [masked, lambda: token_rows(8).remove_columns("labels")])
def test_a_data_set_without_a_loss_is_not_passed_over(tmp_path, turned, without):
    held = {"books": without(), "dvd": token_rows(8)}
    trainer = evaluated(tmp_path, dict(reversed(held.items())) if turned else held)
    with pytest.warns(UserWarning, match=r"expected a loss of each data set, found none of \['books'\]"):
        assert math.isnan(trainer.evaluate()["eval_worst_loss"])


@pytest.mark.parametrize("judged_by", ["worst_loss", "eval_dvd_loss"])
def test_early_stopping_counts_each_evaluation_once(tmp_path, judged_by):
    """With a learning rate of 0 nothing is better than the first."""
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.0}
    every |= {"metric_for_best_model": judged_by, "load_best_model_at_end": True, "max_steps": 6}
    held = {t: token_rows(8) for t in TASKS[:2]}
    assert evaluated(tmp_path, held, [EarlyStoppingCallback(2)], **every).state.global_step == 3


def test_a_task_of_validation_alone_may_be_named_in_its_rows(tmp_path):
    law = {"law": token_rows(8).map(lambda row: {"task": "law"})}
    assert evaluated(tmp_path, law).evaluate()["eval_law_loss"] > 0.0
    law = {"law": texts(6).map(lambda row: {"task": "law"})}
    for packing in (False, True):
        more = {"mix": {"eval_dataset": law}, "packing": packing, "max_length": 16}
        assert run("SFT", tmp_path, max_steps=1, **more).evaluate()["eval_worst_loss"] > 0.0
    wrong = token_rows(8).map(lambda row: {"task": "law"})
    with pytest.raises(ValueError, match=r"expected one of \['books', .*, found 'law'"):
        train(str(tmp_path), batch=8, dataset=wrong)


def test_images_have_no_tokens(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rows = [{"pixel_values": torch.randn(3, 8, 8).tolist(), "labels": i % 2, "task": TASKS[i % 3]} for i in range(24)]
    trainer = with_mixture(Trainer)(
        model=ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=2, **sizes)),
        mixture=bandit(), train_dataset=Dataset.from_list(rows),
        args=TrainingArguments(str(tmp_path), max_steps=2, save_strategy="no", **COMMON),
    )  # fmt: skip
    trainer.train()
    assert trainer.mixture.updates == 2
