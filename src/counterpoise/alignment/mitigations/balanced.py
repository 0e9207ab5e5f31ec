"""Experience replay from several corpora, of which a bandit says how much each is replayed."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from counterpoise.alignment.mitigations.replay import Replay
from counterpoise.alignment.training.stepping import Step
from counterpoise.language.scoring import response_tokens, row_nlls
from counterpoise.multitask.bandit import BanditMTL


@dataclass
class BalancedReplay(Replay):
    """`Replay` whose corpora are drawn, example by example, by the weights of a `BanditMTL` on their own losses.

    A corpus's loss is its mean negative log-likelihood per replayed token, over what that was in the first step that
    drew it: what is being forgotten, whatever a corpus's entropy, is replayed more (as RECAP does, 2510.21978, by its own
    rule). At least half of the corpora stay effective (of two 1.5), and p moves once an optimiser step.

    Args:
        ratio: see `Replay`.
        examples: of all corpora, one after the other.
        seed: of the draws.
        sizes: how many examples each corpus has.

    Raises:
        ValueError: fewer than two corpora, sizes that do not add up; see `Replay`.

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
        self._queues: list[list[int]] = [[] for _ in self.sizes]
        effective = max(len(self.sizes) / 2, 1.5)
        self.bandit = BanditMTL(len(self.sizes), min_effective_tasks=effective, drawn_by="p", normalize=True)
        self.bandit.corrects = False  # every corpus that was drawn tells its mean; one that was not keeps its last

    def add_gradients(self, step: Step) -> None:
        size = response_tokens(step.examples)
        drawn = self._draw(self.ratio * size)
        batch = [self.examples[i] for i in drawn]
        sums, counts = torch.zeros(2, len(self.sizes), dtype=torch.float64)
        for rows in step.batches(batch):
            nll_B = row_nlls(step.model, [batch[i] for i in rows])
            (rows.weight * nll_B.sum() / size).backward()  # type: ignore[no-untyped-call]
            corpora = torch.tensor([bisect_right(self._ends, drawn[i]) for i in rows])
            tokens_B = torch.tensor([float(len(batch[i].response)) for i in rows], dtype=torch.float64)
            sums.index_add_(0, corpora, rows.weight * nll_B.detach().double().cpu())
            counts.index_add_(0, corpora, rows.weight * tokens_B)
        if counts.any():
            self.bandit.observe(sums / counts.clamp(min=1.0), counts)
        if drawn:
            self.bandit.step()

    def _next(self) -> int:
        (corpus,) = self._order.choices(range(len(self.sizes)), self.bandit.probabilities().tolist())
        size = self.sizes[corpus]
        self._queues[corpus] = self._queues[corpus] or self._order.sample(range(size), size)
        return self._ends[corpus] - size + self._queues[corpus].pop()

    def told(self) -> dict[str, float]:
        """By corpus, from 1: its share of what is drawn, and its last loss in nats a token, once there is one."""
        values = enumerate(zip(self.bandit.probabilities().tolist(), self.bandit.last_losses, strict=True), 1)
        found = {f"replay {k} {name}": x for k, pair in values for name, x in zip(("share", "loss"), pair, strict=True)}
        return {name: x for name, x in found.items() if math.isfinite(x)}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"queues": self._queues, "bandit": self.bandit.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._queues = [list(queue) for queue in state["queues"]]
        self.bandit.load_state_dict(state["bandit"])
