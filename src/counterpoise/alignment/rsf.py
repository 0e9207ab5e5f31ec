"""Rejection sampling fine-tuning (RSF, also best-of-n or RAFT): a plain loop.

Each iteration draws n responses per prompt from the current model, keeps the one of highest reward and fine-tunes on
what was kept. Source: Lin et al. 2024 (arXiv 2309.06256), section 3 and its appendix on RSF; Dong et al. 2023 (RAFT).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from counterpoise.language import (
    Example,
    Progress,
    Prompt,
    by_length,
    decode,
    encode_prompt,
    response_nll,
    response_tokens,
    sample,
)

Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""Prompts and responses in, one number each out; higher is better."""


@dataclass(frozen=True)
class Iteration:
    """What one round of RSF did: mean reward of all samples and of the kept ones, mean loss of each epoch (nats)."""

    index: int
    reward: float
    best_reward: float
    losses: tuple[float, ...]
    kept: tuple[Example, ...]

    def summary(self) -> dict[str, Any]:
        """The numbers alone, for a results file."""
        return {name: value for name, value in asdict(self).items() if name != "kept"}


def rsf(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    iterations: int = 10,
    prompts_per_iteration: int = 2048,
    n: int = 32,
    epochs: int = 2,
    learning_rate: float = 1e-5,
    batch_size: int = 32,
    micro_batch_size: int = 8,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    chat: bool = True,
    seed: int = 0,
    after_iteration: Callable[[Iteration], None] | None = None,
    progress: Progress | None = None,
) -> list[Iteration]:
    """Align `model` in place with best-of-n fine-tuning; the defaults are the paper's.

    Args:
        model: a causal language model; train it in float32, or in bfloat16 on hardware made for it.
        prompts: drawn from without replacement until exhausted, then reshuffled.
        reward: scores (prompts, responses); see `counterpoise.evaluation.rewards.load_reward`.
        batch_size: kept responses per optimiser step; `micro_batch_size` of them at once, without changing the result.
        after_iteration: called with each `Iteration`, for instance to save a checkpoint (early stopping).

    Returns:
        One `Iteration` a round.
    """
    order = random.Random(seed)
    queue: list[Prompt] = []
    history: list[Iteration] = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for index in range(iterations):
        chosen: list[Prompt] = []
        while len(chosen) < min(prompts_per_iteration, len(prompts)):
            queue = queue or order.sample(list(prompts), len(prompts))
            chosen.append(queue.pop())
        kept, mean, best = best_of_n(
            model,
            tokenizer,
            chosen,
            reward,
            n=n,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            chat=chat,
            batch_size=8 * micro_batch_size,
            seed=seed * 1000 + index,
            progress=progress,
        )
        losses = fine_tune(
            model, kept, optimizer, epochs=epochs, batch_size=batch_size, micro_batch_size=micro_batch_size, order=order
        )
        history.append(Iteration(index, mean, best, tuple(losses), tuple(kept)))
        if after_iteration is not None:
            after_iteration(history[-1])
    return history


def best_of_n(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    chat: bool = True,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[Example], float, float]:
    """The response of highest reward among n for each prompt, with the mean reward of all and of the kept."""
    encoded = [encode_prompt(tokenizer, prompt, chat=chat) for prompt in prompts]
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
    texts = decode(tokenizer, [ids for group in drawn for ids in group])
    scores = torch.tensor(reward([p.text for p in prompts for _ in range(n)], texts), dtype=torch.float64).view(-1, n)
    if not bool(scores.isfinite().all()):
        raise ValueError("expected a finite reward for every response, found NaN or Inf; check the reward model")
    best = scores.max(dim=1)
    kept = [Example(encoded[i], drawn[i][j]) for i, j in enumerate(best.indices.tolist())]
    return kept, float(scores.mean()), float(best.values.mean())


def fine_tune(
    model: nn.Module,
    examples: Sequence[Example],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int,
    micro_batch_size: int,
    order: random.Random,
    clip: float = 1.0,
) -> list[float]:
    """Supervised epochs on the responses alone; a step's loss is the mean over its response tokens.

    Returns:
        The mean loss per response token of each epoch, in nats.
    """
    losses = []
    model.train()
    for _ in range(epochs):
        total, tokens = 0.0, 0
        shuffled = order.sample(list(examples), len(examples))
        for start in range(0, len(shuffled), batch_size):
            batch = shuffled[start : start + batch_size]
            size = response_tokens(batch)
            for rows in by_length(batch, micro_batch_size, key=lambda e: len(e.prompt) + len(e.response)):
                nll = response_nll(model, [batch[i] for i in rows])
                (nll / size).backward()  # type: ignore[no-untyped-call]
                total += nll.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += size
        losses.append(total / tokens)
    model.eval()
    return losses
