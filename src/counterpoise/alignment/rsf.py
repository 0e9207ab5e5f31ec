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

from counterpoise.alignment.settings import RSF, Settings, refuse_equal
from counterpoise.alignment.training import processes
from counterpoise.alignment.training.rounds import Rounds, draw_together
from counterpoise.alignment.training.run import Run
from counterpoise.alignment.training.stepping import Mitigation, adam, finish_all, start_all, take_step
from counterpoise.evaluation.rewards import Reward, checked, name_of, rate
from counterpoise.language.prompts import Prompt, encode_prompt
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import Example, response_nll, response_tokens
from counterpoise.ranks import sum_over_ranks
from counterpoise.records import Progress


@dataclass(frozen=True)
class Iteration:
    """What one round of RSF did: mean reward of all samples and of the kept ones, mean loss of each epoch (nats).

    The rewards are those of the model before the round's training; `losses` is empty when a budget ended the run there.
    """

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
    settings: RSF = RSF(),
    *,
    mitigations: Sequence[Mitigation] = (),
    run: Run | None = None,
    after_iteration: Callable[[Iteration], None] | None = None,
    progress: Progress | None = None,
) -> list[Iteration]:
    """Align `model` in place with best-of-n fine-tuning; the defaults are the paper's.

    Under torchrun or accelerate the processes share the drawing, the rewards and the rows of every step, and end with
    what one process gives, up to the order of sums (and up to dropout). Each calls `reward` with what it drew.

    Args:
        model: a causal language model; train it in float32, or in bfloat16 on hardware made for it.
        reward: scores (prompts, responses); see `counterpoise.evaluation.rewards.load_reward`.
        mitigations: what holds the model back from forgetting; they act in this order.
        run: a folder of checkpoints; a run that was stopped goes on from its last whole iteration.
        after_iteration: called with each `Iteration` of this process.

    Returns:
        One `Iteration` a round of this process.

    Raises:
        ValueError: a prompt too long for the model's context, a reward that is not finite, n equal responses
            (temperature 0), DeepSpeed.
    """
    rounds = Rounds(model, tokenizer, prompts, settings, run)
    history: list[Iteration] = []
    start_all(mitigations, model, tokenizer)
    optimizer = adam(model, settings.learning_rate)
    rounds.begin(optimizer, mitigations)
    for index in rounds:

        def draw(how: Drawing, stage: Progress | None) -> list[Any]:
            found = draw_and_score(model, tokenizer, rounds.chosen, reward, how, progress=progress or stage)
            kept, scores = [list(map(list, e)) for e in best_of_n(*found)], found[2]
            return [kept, float(scores.mean()), float(scores.amax(1).mean())]

        drawn, mean, best = rounds.once("samples", f"best of {settings.drawing.n}", draw)
        kept = [Example(tuple(prompt), tuple(response)) for prompt, response in drawn]
        rounds.stopped = any(m.stop(mean) for m in mitigations)
        losses: list[float] = []
        if not rounds.stopped:
            stage = rounds.stage("training")
            losses = fine_tune(model, kept, optimizer, settings, rounds.order, mitigations, progress=stage)
        history.append(Iteration(index, mean, best, tuple(losses), tuple(kept)))
        rounds.save(history[-1].summary())
        if after_iteration is not None:
            after_iteration(history[-1])
    finish_all(mitigations, model)
    return history


def best_of_n(
    prompts: Sequence[tuple[int, ...]], drawn: Sequence[Sequence[tuple[int, ...]]], scores: torch.Tensor
) -> list[Example]:
    """The response of highest reward among n for each prompt, of what `draw_and_score` gave."""
    return [Example(prompts[i], drawn[i][j]) for i, j in enumerate(scores.max(dim=1).indices.tolist())]


def draw_and_score(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    drawing: Drawing,
    *,
    progress: Progress | None = None,
) -> tuple[list[tuple[int, ...]], list[list[tuple[int, ...]]], torch.Tensor]:
    """The encoded prompts, n responses for each, and their rewards, (prompts, n) in float64; see `refuse_equal`."""
    refuse_equal(drawing)
    encoded = [encode_prompt(tokenizer, prompt, chat=drawing.chat) for prompt in prompts]

    def rated(rows: list[int], drawn: list[list[tuple[int, ...]]]) -> list[Any]:
        scores = rate(checked(reward, name_of(reward)), tokenizer, [prompts[i] for i in rows], drawn)
        return list(zip(drawn, scores.tolist(), strict=True))

    found = draw_together(model, tokenizer, encoded, drawing, rated, progress=progress)
    drawn, scores = zip(*found, strict=True)
    return encoded, list(drawn), torch.tensor(scores, dtype=torch.float64)


def fine_tune(
    model: nn.Module,
    examples: Sequence[Example],
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    order: random.Random,
    mitigations: Sequence[Mitigation] = (),
    *,
    progress: Progress | None = None,
) -> list[float]:
    """Supervised epochs on the responses alone; a step's loss is the mean over its response tokens.

    The mitigations have started. Returns the mean loss per response token of each epoch, in nats.
    """
    losses = []
    model.train()
    for epoch in range(settings.epochs):
        summed, tokens = 0.0, 0
        shuffled = order.sample(list(examples), len(examples))
        for start in range(0, len(shuffled), settings.batch_size):
            batch = shuffled[start : start + settings.batch_size]
            size = response_tokens(batch)

            def backward(rows: processes.Rows, batch: list[Example] = batch, size: int = size) -> None:
                nonlocal summed
                nll = rows.weight * response_nll(model, [batch[i] for i in rows])
                (nll / size).backward()  # type: ignore[no-untyped-call]
                summed += nll.item()

            take_step(model, optimizer, batch, backward, settings.micro_batch_size, mitigations)
            tokens += size
            if progress is not None:
                progress(epoch * len(examples) + start + len(batch), settings.epochs * len(examples))
        losses.append(sum_over_ranks([summed])[0] / tokens)
    model.eval()
    return losses
