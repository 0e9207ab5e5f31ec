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


def words():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="w1", pad_token="w2")


def texts(count=24):
    rows = [{"text": " ".join(f"w{3 + (7 * i + k) % 29}" for k in range(3 + i % 4)), "task": TASKS[i % 3]} for i in range(count)]
    return Dataset.from_list(rows)


def sft(out, dataset, *, mix=None, resume=None, **kwargs):
    import trl

    given = {"max_steps": 4, "learning_rate": 0.5, "optim": "sgd", "logging_steps": 1, "report_to": [], "use_cpu": True}
    given |= {"bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no"}
    arguments = trl.SFTConfig(str(out), per_device_train_batch_size=4, **given | kwargs)
    trainer = with_mixture(trl.SFTTrainer)(
        model=tiny_llama(), args=arguments, train_dataset=dataset, processing_class=words(), mixture=bandit(), **mix or {}
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("packing", [{}, {"packing": True, "max_length": 12}, {"packing": True, "max_length": 12, "packing_strategy": "wrapped"}, {"padding_free": True, "max_length": None}])
def test_sft(tmp_path, packing):
    t = sft(tmp_path, texts(), **packing)
    print(t.mixture.metrics(), t.schedule.rounds, t.train_dataset.column_names)


def streams():
    def of(i):
        def rows():
            for row in token_rows(12).remove_columns("task"):
                yield row
        return rows
    return {t: IterableDataset.from_generator(of(i)) for i, t in enumerate(TASKS)}


def test_stream(tmp_path):
    t = train(tmp_path / "a", steps=6, dataset=streams(), save_strategy="steps", save_steps=3)
    print(t.mixture.metrics(), t.schedule.rounds)
    r = train(tmp_path / "b", steps=6, dataset=streams(), resume=str(tmp_path / "a" / "checkpoint-3"))
    assert all(map(torch.equal, parameters(t), parameters(r)))
    assert t.mixture.metrics() == r.mixture.metrics()


def test_sft_stream(tmp_path):
    data = {t: IterableDataset.from_generator(lambda: ({"text": f"w{i} w3 w4 w5"} for i in range(5, 12))) for t in TASKS}
    t = sft(tmp_path, data)
    print(t.mixture.metrics(), t.schedule.rounds)


def reward(completions, task, **_):
    """books: how many tokens are w7; dvd: never any; kitchen: a constant for each prompt's whole group."""
    score = {"books": lambda c: float(c.count("w7")), "dvd": lambda c: len(c) % 2, "kitchen": lambda c: 1.0}
    return [score[t](c) for c, t in zip(completions, task, strict=True)]


def prompts():
    return Dataset.from_list([{"prompt": f"w{3 + i} w4", "task": TASKS[i % 3]} for i in range(24)])


def rl(out, *, name="GRPO", data=None, mix=None, resume=None, **kwargs):
    import trl

    given = {"max_steps": 6, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1, "report_to": [], "use_cpu": True}
    given |= {"bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no"}
    given |= {"num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 8, "beta": 0.0}
    arguments = getattr(trl, f"{name}Config")(str(out), **given | kwargs)
    trainer = with_mixture(getattr(trl, f"{name}Trainer"))(
        model=tiny_llama(), reward_funcs=reward, args=arguments, train_dataset=data or prompts(),
        processing_class=words(), mixture=bandit(), **mix or {},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
@pytest.mark.parametrize("mix", [{}, {"oversample": 2}, {"reward_bounds": (0, 4), "improvement": 5.0}])
def test_rl(tmp_path, name, mix):
    t = rl(tmp_path / "a", name=name, mix=mix, save_strategy="steps", save_steps=3)
    print(t.state.log_history[-2])
    r = rl(tmp_path / "b", name=name, mix=mix, resume=str(tmp_path / "a" / "checkpoint-3"))
    assert all(map(torch.equal, parameters(t), parameters(r)))
    assert t.mixture.metrics() == r.mixture.metrics()
    assert t.schedule.rounds == r.schedule.rounds


def test_rl_acc(tmp_path):
    k = dict(gradient_accumulation_steps=2, per_device_train_batch_size=4, num_iterations=2)
    t = rl(tmp_path / "a", save_strategy="steps", save_steps=4, **k)
    r = rl(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-4"), **k)
    assert all(map(torch.equal, parameters(t), parameters(r)))
    assert t.schedule.rounds == r.schedule.rounds


def test_rl_stream(tmp_path):
    data = {t: IterableDataset.from_generator(lambda: ({"prompt": f"w{i} w3"} for i in range(5, 12))) for t in TASKS}
    t = rl(tmp_path / "a", data=data, shuffle_dataset=False)
    print(t.state.log_history[-2])
