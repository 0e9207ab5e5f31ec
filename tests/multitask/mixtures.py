"""A bandit that draws, rows and rewards of three tasks, and one call that trains a tiny Llama on them with a mixture."""

import trl
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from counterpoise.multitask import BanditMTL, with_mixture

from .hf import tiny_llama, token_rows
from .toy import TASKS

COMMON = {"learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": []}
COMMON |= {"use_cpu": True, "disable_tqdm": True}
TRL = {"bf16": False, "gradient_checkpointing": False}


def bandit(**settings):
    return BanditMTL(TASKS, drawn_by="p", **{"rho": 0.5, "eta": 2.0} | settings)


def words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w1", pad_token="w2")


def texts(count=24):
    rows = [" ".join(f"w{3 + (7 * i + k) % 29}" for k in range(3 + i % 4)) for i in range(count)]
    return Dataset.from_list([{"text": text, "task": TASKS[i % 3]} for i, text in enumerate(rows)])


def reward(completions, task, **_):
    """books: how many w7; dvd: whether the length is odd; kitchen: always the same, so never an advantage."""
    score = {"books": lambda c: float(c.count("w7")), "dvd": lambda c: len(c) % 2, "kitchen": lambda c: 0.5}
    return [score[t](c) for c, t in zip(completions, task, strict=True)]


def run(kind, out, *, dataset=None, mixture=None, resume=None, mix=None, **settings):
    """The trainer after training: Trainer, SFT, GRPO or RLOO."""
    settings = COMMON | {"max_steps": 4, "per_device_train_batch_size": 8, "save_strategy": "no"} | settings
    given = {"model": tiny_llama(), "mixture": mixture or bandit(), **(mix or {})}
    if kind == "Trainer":
        trainer = with_mixture(Trainer)(
            args=TrainingArguments(str(out), **settings), train_dataset=dataset or token_rows(), **given
        )
    else:
        if kind != "SFT":
            settings = {"num_generations": 2, "max_completion_length": 4, "beta": 0.0} | settings
            given = {"reward_funcs": reward, **given}
            prompts = Dataset.from_list([{"prompt": f"w{3 + i} w4", "task": TASKS[i % 3]} for i in range(24)])
        arguments = getattr(trl, f"{kind}Config")(str(out), **TRL | settings)
        data = dataset or (texts() if kind == "SFT" else prompts)
        trainer = with_mixture(getattr(trl, f"{kind}Trainer"))(
            args=arguments, train_dataset=data, processing_class=words(), **given
        )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def stream(rows):
    return {t: IterableDataset.from_generator(lambda: iter(rows)) for t in TASKS}
