"""Experience replay from several corpora, of which a bandit says how much each is replayed."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from counterpoise.alignment.mitigations.replay import Replay
from counterpoise.alignment.training.stepping import Step
from counterpoise.language.scoring import response_tokens, row_nlls
from counterpoise.multitask.bandit import BanditMTL
from counterpoise.ranks import NoNumbers, sum_over_ranks

MEASURED = 256
"""Examples of each corpus, the first to be replayed, whose losses are measured before training."""


@dataclass
class BalancedReplay(Replay):
    """`Replay` whose tokens are shared among corpora by the weights of a `BanditMTL` on their own losses.

    A corpus's loss is that of its replayed tokens over what the same tokens lost before training: what is being forgotten,
    whatever a corpus's entropy, is replayed more (as RECAP does, 2510.21978, by its own rule). Of each corpus the first
    MEASURED examples are measured before the first update; later ones count in units of their mean per token. At least
    half of the corpora stay effective (of two 1.5), and p moves once an optimiser step.

    Args:
        ratio: see `Replay`.
        examples: of all corpora, one after the other.
        seed: of the draws.
        sizes: how many examples each corpus has.

    Raises:
        ValueError: fewer than two corpora, sizes that do not add up; see `Replay`.
        NoNumbers: losses before training that are none, or 0 throughout.

    >>> BalancedReplay(0.5, [Example((1,), (5, 6)), Example((1,), (7,))], sizes=(1, 1)).sizes
    (1, 1)
    """

    sizes: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sizes) < 2 or min(self.sizes) < 1 or sum(self.sizes) != len(self.examples):
            raise ValueError(f"replay: expected the sizes of two corpora or more, found {tuple(self.sizes)}")

    def start(self, model: nn.Module, tokenizer: object) -> None:
        super().start(model, tokenizer)
        self._ends = list(accumulate(self.sizes))
        self._queues = [self._order.sample(range(size), size) for size in self.sizes]
        self._due = [0.0] * len(self.sizes)
        self._before: dict[int, float] = {}
        self.bandit = bandit_of_means(len(self.sizes), max(len(self.sizes) / 2, 1.5))

    def add_gradients(self, step: Step) -> None:
        if not self._before:
            self._measure(step)
        size = response_tokens(step.examples)
        drawn = self._draw(self.ratio * size)
        now, before = torch.zeros(2, len(self.sizes), dtype=torch.float64)
        for place, nll in self._losses(step, drawn, scale=1.0 / size):
            corpus = self._corpus(place)
            now[corpus] += nll
            before[corpus] += self._before.get(place, self._usual[corpus] * len(self.examples[place].response))
        if before.any():
            self.bandit.observe(now / before.where(before > 0.0, 1.0), before)
        if drawn:
            self.bandit.step()

    def _losses(self, step: Step, places: Sequence[int], scale: float | None = None) -> Iterator[tuple[int, float]]:
        """The examples of this process's share with their losses; with `scale` their gradients, times it, are added."""
        batch = [self.examples[i] for i in places]
        for rows in step.batches(batch):
            nll_B = row_nlls(step.model, [batch[i] for i in rows])
            if scale is not None:
                (rows.weight * nll_B.sum() * scale).backward()  # type: ignore[no-untyped-call]
            if rows.weight:
                yield from zip([places[i] for i in rows], nll_B.tolist(), strict=True)

    def _measure(self, step: Step) -> None:
        """The losses before training of what is replayed first."""
        ends = zip(self._queues, self._ends, self.sizes, strict=True)
        places = [end - size + i for queue, end, size in ends for i in queue[-MEASURED:]]
        trains = step.model.training
        step.model.eval()
        with torch.no_grad():
            own = dict(self._losses(step, places))
        step.model.train(trains)
        self._know(dict(zip(places, sum_over_ranks([own.get(i, 0.0) for i in places]), strict=True)))
        if not all(math.isfinite(x) and x > 0.0 for x in self._usual):
            raise NoNumbers(f"replay: expected losses per token above 0 before training, found {self._usual}")

    def _know(self, before: dict[int, float]) -> None:
        """Losses before training by example, and with them each corpus's mean per token."""
        sums, tokens = torch.zeros(2, len(self.sizes), dtype=torch.float64)
        for place, nll in before.items():
            sums[self._corpus(place)] += nll
            tokens[self._corpus(place)] += len(self.examples[place].response)
        self._before, self._usual = before, (sums / tokens).tolist()

    def _corpus(self, place: int) -> int:
        return bisect_right(self._ends, place)

    def _draw(self, tokens: float) -> list[int]:
        """Each corpus is owed its share of the tokens, and the one that is owed most comes next."""
        self._due = [due + p * tokens for due, p in zip(self._due, self.bandit.probabilities().tolist(), strict=True)]
        drawn: list[int] = []
        while sum(self._due) > 0:
            corpus = self._due.index(max(self._due))
            size = self.sizes[corpus]
            self._queues[corpus] = self._queues[corpus] or self._order.sample(range(size), size)
            drawn.append(self._ends[corpus] - size + self._queues[corpus].pop())
            self._due[corpus] -= len(self.examples[drawn[-1]].response)
        return drawn

    def told(self) -> dict[str, float]:
        """By corpus, from 1: its share of the replayed tokens, and its last loss over that of before training, once known."""
        values = enumerate(zip(self.bandit.probabilities().tolist(), self.bandit.last_losses, strict=True), 1)
        names = "share", "loss ratio"
        found = {f"replay {k} {name}": x for k, pair in values for name, x in zip(names, pair, strict=True)}
        return {name: x for name, x in found.items() if math.isfinite(x)}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "sizes": list(self.sizes), "compares": "with the loss before training"}

    def state_dict(self) -> dict[str, Any]:
        own = {"queues": self._queues, "due": self._due, "before": self._before, "bandit": self.bandit.state_dict()}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._queues, self._due = [list(queue) for queue in state["queues"]], list(state["due"])
        self._know(dict(state["before"]))
        self.bandit.load_state_dict(state["bandit"])


def bandit_of_means(
    tasks: int | Sequence[str], min_effective_tasks: float, units: Sequence[float] | None = None
) -> BanditMTL:
    """A bandit that draws, and whose p moves on the tasks' mean losses, over `units`, however often each was drawn."""
    normalize = False if units is None else units
    found = BanditMTL(tasks, min_effective_tasks=min_effective_tasks, drawn_by="p", normalize=normalize)
    found.corrects = False  # a task that was not drawn keeps its last mean
    return found
