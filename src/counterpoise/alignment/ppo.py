"""Proximal policy optimisation (PPO) of a language model on a reward: a plain loop, to be read from top to bottom.

A token is an action, a response an episode; the reward arrives with its last token, the KL penalty with every token.
Sources: Schulman et al. 2017 (arXiv 1707.06347), equation 7; Schulman et al. 2016 (GAE, arXiv 1506.02438), equation 16;
Ziegler et al. 2019 (arXiv 1909.08593), equation 2 and section 2.2; the settings of Lin et al. 2024 (arXiv 2309.06256).
Shape suffixes: N responses of a round, B of a micro-batch, C response tokens (rows end together), H hidden.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from counterpoise.alignment.ppo_losses import adapted, gae, policy_loss, value_loss, whiten
from counterpoise.alignment.rsf import draw_and_score
from counterpoise.alignment.training import processes
from counterpoise.alignment.training.bounds import refuse_settings
from counterpoise.alignment.training.models import frozen_copy
from counterpoise.alignment.training.prompts import next_prompts, queue_from, queue_state, refuse_long_prompts
from counterpoise.alignment.training.run import Run, stage_of
from counterpoise.alignment.training.sharding import clip_norm, is_sharded
from counterpoise.alignment.training.stepping import (
    Mitigation,
    adam,
    finish_all,
    rows_of,
    start_all,
    take_step,
    trainable,
)
from counterpoise.evaluation.rewards import Reward
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import Example, response_tokens, score_responses


@dataclass(frozen=True)
class Round:
    """What one round of PPO did.

    Attributes:
        reward: mean over the responses, of the model before the round's training.
        kl: mean over the responses of the summed log-ratio to the reference: an estimate of the KL per response, nats.
        kl_weight: of the penalty in this round.
        policy_loss, value_loss: means over the round's tokens and epochs.
        clipped: share of tokens whose ratio was outside the clip range.
        length: mean response length, tokens.
    """

    index: int
    reward: float
    kl: float
    kl_weight: float
    policy_loss: float
    value_loss: float
    clipped: float
    length: float


class Rollout(NamedTuple):
    """The responses of a round and what was thought of them when they were drawn; all but `examples` of shape (N, C)."""

    examples: list[Example]
    logprobs: Tensor
    advantages: Tensor
    returns: Tensor
    values: Tensor


def ppo(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    drawing: Drawing = Drawing(),
    reference: nn.Module | None = None,
    iterations: int = 10,
    prompts_per_iteration: int = 512,
    epochs: int = 2,
    learning_rate: float = 1e-6,
    value_learning_rate: float = 1e-4,
    batch_size: int = 32,
    micro_batch_size: int = 8,
    kl: float = 0.1,
    kl_target: float | None = None,
    discount: float = 1.0,
    trace: float = 0.95,
    clip: float = 0.2,
    value_clip: float | None = 0.2,
    value_weight: float = 0.1,
    mitigations: Sequence[Mitigation] = (),
    run: Run | None = None,
) -> list[Round]:
    """Align `model` in place with PPO; learning rate, prompts, epochs and KL weight are the paper's, the rest is usual.

    The value head is one linear map of the policy's last hidden states, so that one model is trained and held. It begins
    at the mean reward of the first round: a constant added to every reward changes nothing. Its gradients are clipped
    apart from the policy's. The model stays in evaluation mode (no dropout): the ratio to the sampling policy would not
    start at 1. A response cut at `max_new_tokens` is an episode that ends there. Several processes share the work as in
    `rsf`.

    Args:
        drawing: one response a prompt, of a temperature above 0; its seed also decides the order of prompts and steps.
        reference: the model of the KL penalty, PRE; best from `load_frozen` (memory-mapped), by default a copy.
        iterations: rounds of drawing `prompts_per_iteration` responses, one a prompt, and learning from them.
        kl: weight of the KL penalty; with `kl_target` its start, adapted towards so many nats per response.
        discount, trace: gamma and lambda of GAE.
        clip, value_clip: how far ratio and value may move within a round; None does not clip the value.
        value_weight: of the value loss in the sum.

    Returns:
        One `Round` for each of this process.

    Raises:
        ValueError: a prompt too long for the model's context, a reward or a loss that is not finite, a temperature that
            is not positive, DeepSpeed.
    """
    refuse_unlikely(drawing)
    rates = {
        "learning_rate": learning_rate,
        "value_learning_rate": value_learning_rate,
        "kl": kl,
        "kl_target": kl_target,
    }
    clips = {"clip": clip, "value_clip": value_clip, "value_weight": value_weight, "discount": discount, "trace": trace}
    refuse_settings(**rates, **clips, batch_size=batch_size, micro_batch_size=micro_batch_size)
    refuse_settings(iterations=iterations, prompts_per_iteration=prompts_per_iteration, epochs=epochs)
    processes.refuse_sharded("ppo", cut_up=is_sharded(model))
    processes.join(next(model.parameters()).device)
    refuse_long_prompts(model, tokenizer, prompts, drawing)
    order = random.Random(drawing.seed)
    queue: list[Prompt] = []
    history: list[Round] = []
    reference = frozen_copy(model) if reference is None else reference
    start_all(mitigations, model, tokenizer)
    head = ValueHead(model)
    optimizer, head_optimizer = adam(model, learning_rate), adam(head, value_learning_rate)
    first = 0
    if run is not None and (state := run.load(model, optimizer, mitigations)) is not None:
        first, queue, kl = run.done, queue_from(state, order, prompts), state["kl"]
        head.load_state_dict(state["head"])
        head_optimizer.load_state_dict(state["head_optimizer"])
        iterations = first if state["stopped"] else iterations
    for index in range(first, iterations):
        # 1. One response a prompt from the model as it is, and its reward.
        chosen = next_prompts(queue, order, prompts, prompts_per_iteration)
        title = f"iteration {index + 1} of {iterations}"

        def draw(chosen: list[Prompt] = chosen, index: int = index, title: str = title) -> list[Any]:
            how, stage = replace(drawing, seed=drawing.seed * 1000 + index), stage_of(run, f"{title}: drawing")
            encoded, drawn, scores = draw_and_score(model, tokenizer, chosen, reward, how, progress=stage)
            return [[[list(p), list(r[0])] for p, r in zip(encoded, drawn, strict=True)], scores[:, 0].tolist()]

        rows, scores = draw() if run is None else run.once("rollouts", index, draw)
        examples = [Example(tuple(prompt), tuple(response)) for prompt, response in rows]
        mean_reward = sum(scores) / len(scores)
        stopped = any(m.stop(mean_reward) for m in mitigations)
        if index == 0:
            nn.init.constant_(head.linear.bias, mean_reward)

        # 2. What the policy, the reference and the value head say of every token, and the advantages.
        model.eval()
        with torch.no_grad():
            parts = [look(m, head if m is model else None, examples, micro_batch_size, drawing.temperature)
                     for m in (model, reference)]  # fmt: skip
        (logprobs_NC, values_NC, mask_NC), (reference_NC, _, _) = parts
        log_ratio_NC = logprobs_NC - reference_NC
        rewards_NC = -kl * log_ratio_NC
        rewards_NC[:, -1] += torch.tensor(scores, dtype=rewards_NC.dtype, device=rewards_NC.device)
        advantages_NC, returns_NC = gae(rewards_NC, values_NC, mask_NC, discount, trace)
        rollout = Rollout(examples, logprobs_NC, whiten(advantages_NC, mask_NC), returns_NC, values_NC)

        # 3. Epochs of minibatch steps on the clipped objective.
        losses: list[Losses] = [Losses(0.0, 0.0, 0.0, 0)]
        for epoch in range(0 if stopped else epochs):
            shuffled = order.sample(range(len(examples)), len(examples))
            for start in range(0, len(shuffled), batch_size):
                batch = shuffled[start : start + batch_size]
                update(
                    model,
                    head,
                    optimizer,
                    head_optimizer,
                    rollout,
                    batch,
                    losses,
                    clip=clip,
                    value_clip=value_clip,
                    value_weight=value_weight,
                    temperature=drawing.temperature,
                    micro_batch_size=micro_batch_size,
                    mitigations=mitigations,
                )
                if (stage := stage_of(run, f"{title}: training")) is not None:
                    stage(epoch * len(examples) + start + len(batch), epochs * len(examples))

        # 4. Tell, adapt the penalty, keep.
        observed_kl = float(log_ratio_NC.sum(1).mean())
        *sums, tokens = processes.total([sum(column) for column in zip(*losses, strict=True)])
        policy, value, clipped = (each / (tokens or 1) for each in sums)
        length = response_tokens(examples) / len(examples)
        history.append(Round(index, mean_reward, observed_kl, kl, policy, value, clipped, length))
        if kl_target is not None:
            kl = adapted(kl, observed_kl, kl_target, len(examples))
        if run is not None:
            told = {"method": "ppo", **asdict(history[-1]), "stopped": stopped}
            loop = {**queue_state(queue, order), "stopped": stopped, "kl": kl}
            loop |= {"head": head.state_dict(), "head_optimizer": head_optimizer.state_dict()}
            run.save(index + 1, model, tokenizer, optimizer, mitigations, metrics=told, loop=loop)
        if stopped:
            break
    finish_all(mitigations, model)
    return history


def refuse_unlikely(drawing: Drawing) -> None:
    """Raise where PPO cannot learn from the probabilities of what is drawn.

    Raises:
        ValueError: a temperature of 0, several responses a prompt, or a number out of range.
    """
    if drawing.n != 1:
        raise ValueError(
            f"n: expected 1, found {drawing.n}; PPO draws one response a prompt: raise prompts_per_iteration"
        )
    if not drawing.temperature > 0:
        raise ValueError(
            f"temperature: expected a positive number, found {drawing.temperature}; PPO learns from the probabilities of "
            "what it draws, so leave it at 1"
        )
    drawing.check()


class ValueHead(nn.Module):
    """The expected return before each token: a linear map of the policy's last hidden state, zero at first.

    Its weights are float32 or wider: in bfloat16 no step of the usual size would move a bias of the size of a reward.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        like = next(iter(trainable(model).values()))
        width: int = model.config.get_text_config().hidden_size  # type: ignore[operator,union-attr]
        self.linear = nn.Linear(width, 1, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_BCH: Tensor) -> Tensor:
        """Values, (B, C)."""
        values_BC: Tensor = self.linear(hidden_BCH.to(self.linear.weight.dtype))[..., 0]
        return values_BC


def look(
    model: nn.Module, head: ValueHead | None, examples: Sequence[Example], batch_size: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and values of every response token, and the mask, each (N, C); values are 0 without a head."""
    longest = max(len(e.response) for e in examples)
    like = torch.zeros(len(examples), longest, device=next(model.parameters()).device)
    logprobs_NC, values_NC = like.clone(), like.clone()
    lengths_N = torch.tensor([len(e.response) for e in examples], device=like.device)
    mask_NC = torch.arange(longest, device=like.device) >= longest - lengths_N[:, None]
    for rows in rows_of(model, examples, batch_size):
        scored = score_responses(model, [examples[i] for i in rows], hidden=head is not None)
        if not rows.weight:
            continue
        width = scored.mask_BC.shape[1]
        logprobs_NC[rows, -width:] = scored.logprobs(temperature).to(like)
        if head is not None and scored.hidden_BCH is not None:
            values_NC[rows, -width:] = (head(scored.hidden_BCH) * scored.mask_BC).to(like)
    return processes.add_up(logprobs_NC), processes.add_up(values_NC), mask_NC


class Losses(NamedTuple):
    """Sums over the tokens of a micro-batch."""

    policy: float
    value: float
    clipped: float
    tokens: int


def update(
    model: nn.Module,
    head: ValueHead,
    optimizer: torch.optim.Optimizer,
    head_optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    batch: list[int],
    losses: list[Losses],
    *,
    clip: float,
    value_clip: float | None,
    value_weight: float,
    temperature: float,
    micro_batch_size: int,
    mitigations: Sequence[Mitigation],
) -> None:
    """One step of both optimisers on the responses `batch`: the mean over their tokens of both losses.

    Raises:
        ValueError: a loss that is not finite.
    """
    examples = [rollout.examples[i] for i in batch]
    tokens = response_tokens(examples)

    def backward(rows: processes.Rows) -> None:
        scored = score_responses(model, [examples[i] for i in rows], hidden=True)
        assert scored.hidden_BCH is not None
        mask = scored.mask_BC
        whole = [batch[i] for i in rows]

        def drawn(values_NC: Tensor) -> Tensor:
            return values_NC[whole, -mask.shape[1] :][mask]

        logprobs, old = scored.logprobs(temperature)[mask], drawn(rollout.logprobs)
        policy = policy_loss(logprobs, old, drawn(rollout.advantages), clip).sum()
        value = value_loss(
            head(scored.hidden_BCH)[mask], drawn(rollout.values), drawn(rollout.returns), value_clip
        ).sum()
        loss = rows.weight * (policy + value_weight * value) / tokens
        if rows.weight and not math.isfinite(loss.item()):
            raise ValueError(
                f"ppo: expected a finite loss, found {policy.item()} of the policy and {value.item()} of the value head; "
                "lower the learning rates, or check the model's weights"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        outside = ((logprobs - old).exp() - 1).abs() > clip
        if rows.weight:
            losses.append(Losses(policy.item(), value.item(), float(outside.sum()), int(mask.sum())))

    take_step(model, optimizer, examples, backward, micro_batch_size=micro_batch_size, mitigations=mitigations)
    processes.add_up_gradients(head.parameters())
    clip_norm(list(head.parameters()), 1.0)
    head_optimizer.step()
    head_optimizer.zero_grad(set_to_none=True)
