"""Proxy sets: the responses on which a search computes its objective."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from counterpoise.evaluation.rewards import Reward, rate
from counterpoise.language.prompts import Prompt, encode_prompt
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import Example, by_length, response_nll, response_tokens
from counterpoise.records import Progress


@dataclass(frozen=True)
class ProxySet:
    """A fixed set of responses: a deterministic objective, the mean negative log-likelihood per response token (nats).

    Attributes:
        batch_size: examples run at once; the value does not depend on it.
    """

    examples: tuple[Example, ...]
    batch_size: int = 8

    def backward(self, model: nn.Module) -> float:
        """The objective at the model's weights, its gradient accumulated in the parameters: an `Objective`."""
        return self._run(model, gradient=True)

    @torch.no_grad()
    def nll(self, model: nn.Module) -> float:
        """The objective alone."""
        return self._run(model, gradient=False)

    def _run(self, model: nn.Module, *, gradient: bool) -> float:
        tokens, total = response_tokens(self.examples), 0.0
        for rows in by_length(self.examples, self.batch_size, key=lambda e: len(e.prompt) + len(e.response)):
            nll = response_nll(model, [self.examples[i] for i in rows])
            if gradient:
                (nll / tokens).backward()  # type: ignore[no-untyped-call]
            total += nll.item()
        return total / tokens


@dataclass(frozen=True)
class Rated:
    """Responses with rewards, n of each prompt in a row.

    Attributes:
        rewards: shape (prompts, n).
    """

    examples: tuple[Example, ...]
    rewards: NDArray[np.float64]


def draw_rated(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    drawing: Drawing,
    *,
    progress: Progress | None = None,
) -> Rated:
    """Responses to each prompt, none selected, with their rewards."""
    encoded = [encode_prompt(tokenizer, p, chat=drawing.chat) for p in prompts]
    drawn = sample(model, tokenizer, encoded, drawing, progress=progress)
    examples = tuple(Example(p, y) for p, group in zip(encoded, drawn, strict=True) for y in group)
    return Rated(examples, rate(reward, tokenizer, prompts, drawn))


def draw_proxies(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    drawing: Drawing,
    *,
    size: int = 2000,
    keep: float = 0.4,
    progress: Progress | None = None,
) -> list[Example]:
    """Good responses of POST on the alignment prompts: the paper's proxy for alignment (Lin et al. 2024, section 5).

    Of `drawing.n` responses per prompt (2 in `proxies`), the share `keep` with the highest reward stays, and `size` of
    those are drawn at random (the paper: 2000 of the best 5000). No ability data is used.

    Args:
        model: POST.
    """
    rated = draw_rated(model, tokenizer, prompts, reward, drawing, progress=progress)
    examples, scores = rated.examples, rated.rewards.ravel()
    ranked = sorted(range(len(examples)), key=lambda i: (-scores[i], i))
    pool = ranked[: max(1, round(keep * len(ranked)))]
    chosen = pool if len(pool) <= size else random.Random(drawing.seed).sample(pool, size)
    return [examples[i] for i in sorted(chosen)]
