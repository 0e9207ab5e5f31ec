"""One optimiser step, with the places where a mitigation of the alignment tax plugs in.

RSF, PPO and the distillation style take their steps here; DPO calls the same hooks from TRL's trainer (dpo.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise.alignment.training import processes
from counterpoise.alignment.training.sharding import clip_norm
from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.language.checkpointing import as_asked
from counterpoise.language.scoring import Example
from counterpoise.ranks import is_sharded

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

    def told(self) -> dict[str, float]:
        """What a line of metrics says of it, by a name of its own."""
        return {}

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
    with as_asked(model):
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


def told_of(mitigations: Sequence[Mitigation]) -> dict[str, float]:
    """What a line of metrics says of them all."""
    return {name: value for mitigation in mitigations for name, value in mitigation.told().items()}


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
