"""Rejection sampling fine-tuning (RSF, also best-of-n or RAFT): a plain loop.

Each iteration draws n responses per prompt from the current model, keeps the one of highest reward and fine-tunes on
what was kept. Source: Lin et al. 2024 (arXiv 2309.06256), section 3 and its appendix on RSF; Dong et al. 2023 (RAFT).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from counterpoise.alignment.training import processes
from counterpoise.alignment.training.bounds import refuse_settings
from counterpoise.alignment.training.precision import weights_cast_once
from counterpoise.alignment.training.prompts import next_prompts, queue_from, queue_state, refuse_long_prompts
from counterpoise.alignment.training.run import Run, stage_of
from counterpoise.alignment.training.sharding import is_sharded, whole_weights
from counterpoise.alignment.training.stepping import Mitigation, adam, finish_all, start_all, take_step
from counterpoise.evaluation.rewards import Reward, checked, name_of, rate
from counterpoise.language.prompts import Prompt, encode_prompt
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import Example, response_nll, response_tokens
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
    *,
    drawing: Drawing = Drawing(n=32),
    iterations: int = 10,
    prompts_per_iteration: int = 2048,
    epochs: int = 2,
    learning_rate: float = 1e-5,
    batch_size: int = 32,
    micro_batch_size: int = 8,
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
        prompts: drawn from without replacement until exhausted, then reshuffled.
        reward: scores (prompts, responses); see `counterpoise.evaluation.rewards.load_reward`.
        drawing: n responses a prompt; its seed also decides the order of prompts and of steps.
        batch_size: kept responses per optimiser step; `micro_batch_size` of them at once, without changing the result.
        mitigations: what holds the model back from forgetting; they act in this order.
        run: a folder of checkpoints; a run that was stopped goes on from its last whole iteration.
        after_iteration: called with each `Iteration` of this process.

    Returns:
        One `Iteration` a round of this process.

    Raises:
        ValueError: a prompt too long for the model's context, a reward that is not finite, n equal responses
            (temperature 0), DeepSpeed.
    """
    refuse_equal(drawing)
    sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "learning_rate": learning_rate}
    refuse_settings(iterations=iterations, prompts_per_iteration=prompts_per_iteration, epochs=epochs, **sizes)
    processes.refuse_sharded("rsf", cut_up=is_sharded(model))
    processes.join(next(model.parameters()).device)
    refuse_long_prompts(model, tokenizer, prompts, drawing)
    order = random.Random(drawing.seed)
    queue: list[Prompt] = []
    history: list[Iteration] = []
    start_all(mitigations, model, tokenizer)
    optimizer = adam(model, learning_rate)
    first = 0
    if run is not None and (kept_state := run.load(model, optimizer, mitigations)) is not None:
        first, queue = run.done, queue_from(kept_state, order, prompts)
        iterations = first if kept_state["stopped"] else iterations
    for index in range(first, iterations):
        chosen = next_prompts(queue, order, prompts, prompts_per_iteration)
        title = f"iteration {index + 1} of {iterations}"

        def draw(chosen: list[Prompt] = chosen, index: int = index, title: str = title) -> list[Any]:
            stage = progress or stage_of(run, f"{title}: best of {drawing.n}")
            how = replace(drawing, seed=drawing.seed * 1000 + index)
            kept, mean, best = best_of_n(model, tokenizer, chosen, reward, how, progress=stage)
            return [[list(map(list, e)) for e in kept], mean, best]

        drawn, mean, best = draw() if run is None else run.once("samples", index, draw)
        kept = [Example(tuple(prompt), tuple(response)) for prompt, response in drawn]
        stopped = any(m.stop(mean) for m in mitigations)
        losses = (
            []
            if stopped
            else fine_tune(
                model,
                kept,
                optimizer,
                epochs=epochs,
                batch_size=batch_size,
                micro_batch_size=micro_batch_size,
                order=order,
                mitigations=mitigations,
                progress=stage_of(run, f"{title}: training"),
            )
        )
        history.append(Iteration(index, mean, best, tuple(losses), tuple(kept)))
        if run is not None:
            told = {"method": "rsf", **history[-1].summary(), "stopped": stopped}
            loop = {**queue_state(queue, order), "stopped": stopped}
            run.save(index + 1, model, tokenizer, optimizer, mitigations, metrics=told, loop=loop)
        if after_iteration is not None:
            after_iteration(history[-1])
        if stopped:
            break
    finish_all(mitigations, model)
    return history


def best_of_n(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    drawing: Drawing,
    *,
    progress: Progress | None = None,
) -> tuple[list[Example], float, float]:
    """The response of highest reward among n for each prompt, with the mean reward of all and of the kept."""
    encoded, drawn, scores = draw_and_score(model, tokenizer, prompts, reward, drawing, progress=progress)
    best = scores.max(dim=1)
    kept = [Example(encoded[i], drawn[i][j]) for i, j in enumerate(best.indices.tolist())]
    return kept, float(scores.mean()), float(best.values.mean())


def draw_and_score(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    drawing: Drawing,
    *,
    progress: Progress | None = None,
) -> tuple[list[tuple[int, ...]], list[list[tuple[int, ...]]], torch.Tensor]:
    """The encoded prompts, n responses for each, and their rewards, (prompts, n) in float64.

    Raises:
        ValueError: n equal responses (temperature 0).
    """
    refuse_equal(drawing)
    encoded = [encode_prompt(tokenizer, prompt, chat=drawing.chat) for prompt in prompts]

    def own() -> dict[int, tuple[list[tuple[int, ...]], list[float]]]:
        with weights_cast_once(model):
            drawn = sample(processes.sharing(model), tokenizer, encoded, drawing, progress=progress)
        rows = [i for i, group in enumerate(drawn) if processes.ELSEWHERE not in group[0]]
        if not rows:
            return {}
        rated = checked(reward, name_of(reward))
        scores = rate(rated, tokenizer, [prompts[i] for i in rows], [drawn[i] for i in rows])
        return {i: (drawn[i], row) for i, row in zip(rows, scores.tolist(), strict=True)}

    with whole_weights(model):  # out here: a process that has no room for them ends, and with it all
        found = {i: row for part in processes.gathered(own) for i, row in part.items()}
    drawn, scores = zip(*(found[i] for i in range(len(prompts))), strict=True)
    return encoded, list(drawn), torch.tensor(scores, dtype=torch.float64)


def refuse_equal(drawing: Drawing) -> None:
    """Raise where all n responses to a prompt would be the same.

    Raises:
        ValueError: a temperature of 0 with n above 1, or a number out of range.
    """
    drawing.check()
    if drawing.n > 1 and not drawing.temperature > 0:
        raise ValueError(
            f"temperature: expected a positive number, found {drawing.temperature}, at which all {drawing.n} responses are "
            "the same; raise it, or draw one (n = 1)"
        )


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
    mitigations: Sequence[Mitigation] = (),
    progress: Progress | None = None,
) -> list[float]:
    """Supervised epochs on the responses alone; a step's loss is the mean over its response tokens.

    Args:
        mitigations: already started.

    Returns:
        The mean loss per response token of each epoch, in nats.
    """
    losses = []
    model.train()
    for epoch in range(epochs):
        total, tokens = 0.0, 0
        shuffled = order.sample(list(examples), len(examples))
        for start in range(0, len(shuffled), batch_size):
            batch = shuffled[start : start + batch_size]
            size = response_tokens(batch)

            def backward(rows: processes.Rows, batch: list[Example] = batch, size: int = size) -> None:
                nonlocal total
                nll = rows.weight * response_nll(model, [batch[i] for i in rows])
                (nll / size).backward()  # type: ignore[no-untyped-call]
                total += nll.item()

            take_step(
                model,
                optimizer,
                batch,
                backward,
                micro_batch_size=micro_batch_size,
                mitigations=mitigations,
                clip=clip,
            )
            tokens += size
            if progress is not None:
                progress(epoch * len(examples) + start + len(batch), epochs * len(examples))
        losses.append(processes.total([total])[0] / tokens)
    model.eval()
    return losses
