"""Training through TRL: the settings that its trainers share here; no bars, tables and printed log lines but ours."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from counterpoise.alignment.settings import DPO, RewardTraining, rows_at_once
from counterpoise.alignment.training import processes
from counterpoise.alignment.training.run import telling
from counterpoise.language.loading import without_bars
from counterpoise.language.ways import context_of
from counterpoise.records import Progress

SETTINGS: dict[str, Any] = {"logging_steps": 1, "disable_tqdm": True, "report_to": "none"}
SETTINGS |= {"bf16": False, "gradient_checkpointing": False}
"""Of every trainer, whatever it trains."""


def trl_for(who: str) -> Any:
    """The package trl; a ModuleNotFoundError says where it comes from."""
    try:
        import trl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{who} needs trl; pip install 'counterpoise[align]'") from error
    return trl


def arguments(settings: DPO | RewardTraining, model: Any, folder: str | Path, world: int = 1) -> dict[str, Any]:
    """What every trainer here is told, for `world` processes."""
    at_once = rows_at_once(settings, world)
    return {
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": settings.batch_size // (at_once * world),
        "max_length": longest(model, settings.max_length),
        "use_cpu": next(model.parameters()).device.type == "cpu",
        "seed": settings.seed,
        **SETTINGS,
    }


def on_own_gpu(config: Any, model: Any) -> Any:
    """A trainer's settings, on the GPU that the model is on and no other.

    Of one process the settings would be on the first GPU, for all that it sees, which TRL refuses where there are several.
    """
    own = next(model.parameters()).device
    if own.type == "cuda" and processes.started() == 1:
        vars(config)["_setup_devices"], config._n_gpu = own, 1  # the first is a cached property
        torch.cuda.set_device(own)  # accelerate's is the current one
    return config


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars of datasets and transformers, no reports of loading, no deprecations of settings that TRL sets."""
    import datasets
    from transformers.utils import logging

    shown, level = datasets.is_progress_bar_enabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with without_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def longest(model: Any, max_length: int) -> int:
    """Tokens of a sequence: `max_length`, or the model's context where that is shorter."""
    return min(max_length, context_of(model.config) or max_length)


def with_pad_token(tokenizer: Any) -> Any:
    """A copy of the tokenizer that has a pad token: its own, else its end-of-sequence token, which it must have."""
    if tokenizer.eos_token is None:
        raise ValueError(
            "tokenizer: expected an end-of-sequence token, which ends every response, found none; set eos_token in its "
            "tokenizer_config.json"
        )
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Bar(TrainerCallback):
    """Moves a progress bar with the trainer's steps."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps)


def train_quietly(trainer: Any, bar: Bar, who: str, *, resume_from: Path | None = None) -> list[dict[str, Any]]:
    """Train, and return the log lines that hold a loss; an OSError says that the trainer's folder cannot be written."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(bar)
    with telling(f"{who}: expected to write to {trainer.args.output_dir}"):
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return [line for line in trainer.state.log_history if "loss" in line]
