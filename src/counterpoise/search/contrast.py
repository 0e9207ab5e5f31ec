"""Contrast: good against bad responses to the same prompt, so that only what earns reward counts as alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from counterpoise.evaluation.rewards import Reward
from counterpoise.language import Example, Progress, Prompt, decode, encode_prompt, sample
from counterpoise.search.sides import WeightedSet, advantages


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
    *,
    n: int = 4,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    chat: bool = True,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Rated:
    """n responses to each prompt, none selected, with their rewards."""
    encoded = [encode_prompt(tokenizer, p, chat=chat) for p in prompts]
    drawn = sample(
        model,
        tokenizer,
        encoded,
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    examples = tuple(Example(p, y) for p, group in zip(encoded, drawn, strict=True) for y in group)
    scores = reward([p.text for p in prompts for _ in range(n)], decode(tokenizer, [e.response for e in examples]))
    return Rated(examples, np.asarray(scores, dtype=np.float64).reshape(len(prompts), n))


def contrast(rated: Sequence[Rated], *, batch_size: int = 8, temperature: float = 1.0) -> WeightedSet:
    """Minus the advantage-weighted log-likelihood of the responses, as an objective.

    F(r) = -sum_i a_i log p_r(y_i | x_i) / tokens, the advantages summing to 0 over the responses of one model to one
    prompt. So what POST says and PRE does not counts for nothing by itself; only a response better or worse than its
    siblings does. At the model that drew them the gradient is minus the policy gradient of the reward (RLOO).

    Args:
        rated: of POST, and of PRE too where the search should also know what to prefer at that end.

    Raises:
        ValueError: all responses to every prompt have the same reward.
    """
    pairs = [
        (e, a)
        for group in rated
        for e, a in zip(group.examples, advantages(group.rewards).ravel().tolist(), strict=True)
        if a != 0.0
    ]
    if not pairs:
        raise ValueError(
            "contrast: expected responses of different reward to at least one prompt, found none; "
            "draw more responses or use a finer reward"
        )
    return WeightedSet(tuple(e for e, _ in pairs), tuple(a for _, a in pairs), batch_size, temperature)
