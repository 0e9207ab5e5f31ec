"""Drawing prompts for one iteration after another."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from counterpoise.language.prompts import Prompt, encode_prompt
from counterpoise.language.sampling import Drawing


def next_prompts(queue: list[Prompt], order: random.Random, prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The next `count` prompts, at most all; `queue` holds what is left of a shuffle and is refilled when empty."""
    chosen: list[Prompt] = []
    while len(chosen) < min(count, len(prompts)):
        if not queue:
            queue += order.sample(list(prompts), len(prompts))
        chosen.append(queue.pop())
    return chosen


def queue_state(queue: Sequence[Prompt], order: random.Random) -> dict[str, Any]:
    """What `queue_from` needs."""
    return {"queue": [p.key for p in queue], "order": order.getstate()}


def queue_from(state: Mapping[str, Any], order: random.Random, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The queue as it was, and `order` set to where it was."""
    version, internal, gauss = state["order"]
    order.setstate((version, tuple(internal), gauss))
    by_key = {p.key: p for p in prompts}
    return [by_key[key] for key in state["queue"]]


def refuse_long_prompts(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], drawing: Drawing) -> None:
    """Raise before any work when a prompt and its response do not fit the model's context.

    Raises:
        ValueError: no prompts, or one that is too long.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one, found none")
    new = drawing.max_new_tokens
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return
    lengths = [len(encode_prompt(tokenizer, p, chat=drawing.chat)) for p in prompts]
    worst = max(range(len(prompts)), key=lengths.__getitem__)
    if lengths[worst] + new > limit:
        many = sum(length + new > limit for length in lengths)
        raise ValueError(
            f"prompts: expected at most {limit - new} tokens (a context of {limit} less {new} to "
            f"generate), found {lengths[worst]} in {prompts[worst].text[:60]!r} ({many} of {len(prompts)} are too "
            "long); drop or shorten them, or lower max_new_tokens"
        )
