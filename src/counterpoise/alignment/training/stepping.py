"""One optimiser step, with the places where a mitigation of the alignment tax plugs in, and what its settings may be.

RSF, PPO and the distillation style take their steps here; DPO calls the same hooks from TRL's trainer (dpo.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise.alignment.training import processes
from counterpoise.alignment.training.sharding import clip_norm, is_sharded
from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.language.scoring import Example

COUNTS = "iterations prompts_per_iteration epochs batch_size micro_batch_size max_length saves steps every openings"
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (COUNTS, lambda v: v >= 1, "at least 1"),
    ("learning_rate beta kl_target clip value_clip", lambda v: 0 < v < math.inf, "a positive number"),
    ("kl value_weight value_learning_rate", lambda v: 0 <= v < math.inf, "a number of at least 0"),
    ("discount trace", lambda v: 0 <= v <= 1, "a number from 0 to 1"),
)
"""Settings of the methods, what they may be, and how that is said."""
CLIP = 1.0
"""Largest norm of the gradients of all losses together; penalties on weights come after it."""


@dataclass(frozen=True)
class Step:
    """What one optimiser step learns from.

    Attributes:
        examples: the prompts and responses of the whole batch, not of one micro-batch.
        learning_rate: of the model's weights in this step.
        micro_batch_size: how many examples fit through the model at once.
    """

    model: nn.Module
    examples: Sequence[Example]
    learning_rate: float
    micro_batch_size: int

    def batches(self, examples: Sequence[Example]) -> Iterator[processes.Rows]:
        """Indices of `examples` in micro-batches of like length: of several processes, this one's share.

        A loss over them is multiplied by their `weight`, which is 0 where they only keep the other processes company.
        """
        return rows_of(self.model, examples, self.micro_batch_size)


class Mitigation:
    """Something that holds an alignment back from forgetting. Every method does nothing; a mitigation overrides some.

    A training run calls, in this order: `start` once, on the model before alignment; in each optimiser step
    `add_gradients` (losses of its own, before the gradients are clipped), `before_update` (penalties on weights, after
    clipping) and `after_update` (weights); `stop` once an iteration; `finish` once. Each hook runs once per optimiser
    step, so a batch of 1 x 8 and one of 8 x 1 give the same. Several act in the order of their list.
    """

    prepares = False
    """Whether `start` decides which parameters are trained: those start first and finish last."""

    def start(self, model: nn.Module, tokenizer: Any) -> None:
        """Prepare: `model` holds the weights before alignment, on the device it is trained on."""

    def add_gradients(self, step: Step) -> None:
        """Add the gradients of further losses to the parameters', over `step.batches(...)` of their examples."""

    def before_update(self, step: Step) -> None:
        """Change the gradients before the optimiser uses them."""

    def after_update(self, step: Step) -> None:
        """Change the weights after the optimiser did."""

    def stop(self, reward: float) -> bool:
        """Whether training ends here: `reward` is the mean over samples of the model as it is now."""
        return False

    @contextmanager
    def as_finished(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model is what it would be if training ended now: what a checkpoint on the way is made of."""
        yield

    def finish(self, model: nn.Module) -> None:
        """Leave the result in `model`."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers between steps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`, after `start`."""

    def describe(self) -> dict[str, Any]:
        """Its name and plain settings, for records."""
        named: list[str] = [f.name for f in fields(self) if f.init] if is_dataclass(self) else []
        plain = {name: getattr(self, name) for name in named}
        return {"name": type(self).__name__} | {k: v for k, v in plain.items() if isinstance(v, (int, float, str))}


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    backward: Callable[[processes.Rows], None],
    micro_batch_size: int,
    mitigations: Sequence[Mitigation],
) -> None:
    """Accumulate the gradients of `examples`, clip their norm to CLIP, update once.

    Several processes share the examples and add their gradients up; from there on each does the same with the same
    numbers, so that weights stay equal bit for bit. `backward` is given the indices of a micro-batch and adds the
    gradients of its share of the step's loss, times their weight.
    """
    step = Step(model, examples, optimizer.param_groups[0]["lr"], micro_batch_size)
    for rows in step.batches(examples):
        backward(rows)
    for mitigation in mitigations:
        mitigation.add_gradients(step)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    processes.add_up_gradients(parameters)
    clip_norm(parameters, CLIP)
    for mitigation in mitigations:
        mitigation.before_update(step)
    optimizer.step()
    for mitigation in mitigations:
        mitigation.after_update(step)
    optimizer.zero_grad(set_to_none=True)


def rows_of(model: nn.Module, examples: Sequence[Example], batch_size: int) -> Iterator[processes.Rows]:
    """This process's share of `examples` in micro-batches of like length, for passes through `model`."""
    lengths = [len(e.prompt) + len(e.response) for e in examples]
    return processes.shared_by_length(lengths, batch_size, together=is_sharded(model))


def start_all(mitigations: Sequence[Mitigation], model: nn.Module, tokenizer: Any) -> None:
    """Start each, those that decide what is trained first."""
    for mitigation in sorted(mitigations, key=lambda m: not m.prepares):
        mitigation.start(model, tokenizer)


def finish_all(mitigations: Sequence[Mitigation], model: nn.Module) -> None:
    """Leave the result in `model`, those that decided what is trained last."""
    for mitigation in sorted(mitigations, key=lambda m: m.prepares):
        mitigation.finish(model)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an optimiser moves, by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adam(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW without weight decay, which would pull towards zero and not towards the model before alignment."""
    return torch.optim.AdamW(trainable(model).values(), lr=learning_rate, weight_decay=0.0)


def weights_sha256(weights: Mapping[str, Tensor]) -> Any:
    """What tells weights from others in a record: sha256 of a checkpoint's files, or of all names and tensors."""
    if isinstance(weights, Checkpoint):
        return weights.sha256
    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def refuse_settings(**settings: Any) -> None:
    """Raise a ValueError for a setting outside its range; None and names that are not known here pass.

    >>> refuse_settings(epochs=0)
    Traceback (most recent call last):
    ValueError: epochs: expected at least 1, found 0
    """
    for name, value in settings.items():
        for names, fits, expected in RANGES:
            if name in names.split() and value is not None and not fits(value):
                raise ValueError(f"{name}: expected {expected}, found {value}")


def rows_at_once(who: str, batch_size: int, micro_batch_size: int, world: int = 1) -> int:
    """How many rows of a step each process runs at once, for a trainer that accumulates micro-batches of one size.

    A batch that `world` processes cannot share in such micro-batches is a ValueError.
    """
    at_once = min(micro_batch_size, max(1, batch_size // world))
    if batch_size % (at_once * world):
        raise ValueError(
            f"{who}: expected a batch size that {world} processes share in micro-batches of {at_once}, found {batch_size}"
        )
    return at_once
