"""Rounds of drawing responses and learning from them, as rsf and ppo have them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from counterpoise.alignment.settings import InRounds
from counterpoise.alignment.training import processes
from counterpoise.alignment.training.precision import weights_cast_once
from counterpoise.alignment.training.run import Run
from counterpoise.alignment.training.sharding import whole_weights
from counterpoise.alignment.training.stepping import Mitigation
from counterpoise.language.prompts import Prompt, encode_prompts
from counterpoise.language.sampling import Drawing, sample, settled
from counterpoise.language.scoring import device_of
from counterpoise.language.ways import context_of
from counterpoise.ranks import from_first, gathered, is_sharded, turn
from counterpoise.records import Progress

T = TypeVar("T")


@dataclass
class Rounds:
    """The rounds of one training, by their index; of a run that was stopped, those that are left.

    Attributes:
        run: where each round is kept; without one nothing is.
        stopped: set by the method where a mitigation ends the training: the round in progress is the last.
        chosen: the prompts of the round in progress.
        order: of prompts and of steps.

    Raises:
        ValueError: settings out of range, DeepSpeed, no prompts, or one that is too long for the model's context.
    """

    model: nn.Module
    tokenizer: Any
    prompts: Sequence[Prompt]
    settings: InRounds
    run: Run | None
    stopped = False

    def __post_init__(self) -> None:
        self.settings.check()
        processes.refuse_sharded(self.settings.title, cut_up=is_sharded(self.model))
        processes.join(device_of(self.model))
        if not self.prompts:
            raise ValueError("prompts: expected at least one, found none")
        how = self.settings.drawing
        if (limit := context_of(self.model.config)) is not None:
            encode_prompts(self.tokenizer, self.prompts, chat=how.chat, new=how.max_new_tokens, limit=limit)
        self.order = random.Random(how.seed)
        self._index, self._queue, self.chosen = 0, list[Prompt](), list[Prompt]()

    def begin(self, optimizer: torch.optim.Optimizer, mitigations: Sequence[Mitigation]) -> dict[str, Any] | None:
        """Put the last whole round's state back: what the method itself gave to `save`; None at the very start."""
        if self.run is None or (state := self.run.load(self.model, self.tokenizer, optimizer, mitigations)) is None:
            return None
        self.order.setstate(state["order"])
        by_key = {p.key: p for p in self.prompts}
        self._index, self.stopped = self.run.done, state["stopped"]
        self._queue = [by_key[key] for key in state["queue"]]
        return state

    def __iter__(self) -> Iterator[int]:
        how = self.settings
        while self._index < how.iterations and not self.stopped:
            self.chosen = next_prompts(self._queue, self.order, self.prompts, how.prompts_per_iteration)
            yield self._index
            self._index += 1

    def stage(self, what: str) -> Progress | None:
        """The progress of one stage of the round."""
        title = f"iteration {self._index + 1} of {self.settings.iterations}: {what}"
        return None if self.run is None else self.run.stage(title)

    def once(self, what: str, stage: str, draw: Callable[[Drawing, Progress | None], T]) -> T:
        """The json value that `draw` gives with the round's own seed; a run keeps it as `what`."""

        def work() -> T:
            how = self.settings.drawing
            return draw(replace(how, seed=how.seed * 1000 + self._index), self.stage(stage))

        return work() if self.run is None else self.run.once(what, self._index, work)

    def save(self, told: Mapping[str, Any], **loop: Any) -> None:
        """Keep the round: `told` of it in the metrics, `loop` for `begin`."""
        if self.run is not None:
            told = {"method": self.settings.title, **told, "stopped": self.stopped}
            loop |= {"queue": [p.key for p in self._queue], "order": self.order.getstate(), "stopped": self.stopped}
            self.run.save(self._index + 1, metrics=told, loop=loop)


def draw_together(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    drawing: Drawing,
    each: Callable[[list[int], list[list[tuple[int, ...]]]], Sequence[T]],
    *,
    progress: Progress | None = None,
) -> list[T]:
    """One value a prompt, known to all: `each` of the prompts of this process, by number, and of the responses to them."""

    def own() -> dict[int, T]:
        with weights_cast_once(model):
            drawn = sample(model, tokenizer, prompts, drawing, turn=turn(), progress=progress)
        rows = [i for i, group in enumerate(drawn) if group]
        return dict(zip(rows, each(rows, [drawn[i] for i in rows]), strict=True)) if rows else {}

    with whole_weights(model):  # out here: a process that has no room for them ends, and with it all
        drawing = from_first(lambda: settled(model, prompts, drawing))
        found = {i: value for part in gathered(own) for i, value in part.items()}
    return [found[i] for i in range(len(prompts))]


def next_prompts(queue: list[Prompt], order: random.Random, prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The next `count` prompts, at most all; `queue` holds what is left of a shuffle and is refilled when empty."""
    chosen: list[Prompt] = []
    while len(chosen) < min(count, len(prompts)):
        if not queue:
            queue += order.sample(list(prompts), len(prompts))
        chosen.append(queue.pop())
    return chosen
