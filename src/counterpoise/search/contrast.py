"""Contrast: good against bad responses to the same prompt, so that only what earns reward counts as alignment."""

from __future__ import annotations

from collections.abc import Sequence

from counterpoise.search.proxies import Rated
from counterpoise.search.sides import WeightedSet, advantages


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
