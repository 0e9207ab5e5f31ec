"""Proximal policy optimisation (PPO) of a language model on a reward: a plain loop, to be read from top to bottom.

A token is an action, a response an episode; the reward arrives with its last token, the KL penalty with every token.
Sources: Schulman et al. 2017 (arXiv 1707.06347), equation 7; Schulman et al. 2016 (GAE, arXiv 1506.02438), equation 16;
Ziegler et al. 2019 (arXiv 1909.08593), equation 2 and section 2.2; the settings of Lin et al. 2024 (arXiv 2309.06256).
Shape suffixes: N responses of a round, B of a micro-batch, C response tokens (rows end together), H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from counterpoise.alignment.ppo_losses import adapted, gae, policy_loss, value_loss, whiten
from counterpoise.alignment.rsf import draw_and_score
from counterpoise.alignment.settings import PPO
from counterpoise.alignment.training import processes, stepping
from counterpoise.alignment.training.models import frozen_copy
from counterpoise.alignment.training.rounds import Rounds
from counterpoise.alignment.training.run import Run
from counterpoise.alignment.training.sharding import clip_norm
from counterpoise.alignment.training.stepping import Mitigation
from counterpoise.evaluation.rewards import Reward
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import Example, device_of, response_tokens, score_responses
from counterpoise.ranks import sum_over_ranks
from counterpoise.records import Progress


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
    settings: PPO = PPO(),
    *,
    reference: nn.Module | None = None,
    mitigations: Sequence[Mitigation] = (),
    run: Run | None = None,
) -> list[Round]:
    """Align `model` in place with PPO.

    The value head is one linear map of the policy's last hidden states, so that one model is trained and held. It begins
    at the mean reward of the first round: a constant added to every reward changes nothing. Its gradients are clipped
    apart from the policy's. The model stays in evaluation mode (no dropout): the ratio to the sampling policy would not
    start at 1. A response cut at `max_new_tokens` is an episode that ends there. Several processes share the work as in
    `rsf`.

    Args:
        reference: the model of the KL penalty, PRE; best from `load_frozen` (memory-mapped), by default a copy.

    Returns:
        One `Round` for each of this process.

    Raises:
        ValueError: a prompt too long for the model's context, a reward or a loss that is not finite, a temperature that
            is not positive, DeepSpeed.
    """
    rounds = Rounds(model, tokenizer, prompts, settings, run)
    history: list[Round] = []
    reference = frozen_copy(model) if reference is None else reference
    stepping.start_all(mitigations, model, tokenizer)
    head = ValueHead(model)
    optimizer = stepping.adam(model, settings.learning_rate)
    head_optimizer = stepping.adam(head, settings.value_learning_rate)
    learner = model, head, optimizer, head_optimizer
    kl, epochs, batch_size = settings.kl, settings.epochs, settings.batch_size
    if (state := rounds.begin(optimizer, mitigations)) is not None:
        kl = state["kl"]
        head.load_state_dict(state["head"])
        head_optimizer.load_state_dict(state["head_optimizer"])
    for index in rounds:
        # 1. One response a prompt from the model as it is, and its reward.
        def draw(how: Drawing, stage: Progress | None) -> list[Any]:
            encoded, drawn, scores = draw_and_score(model, tokenizer, rounds.chosen, reward, how, progress=stage)
            return [[[list(p), list(r[0])] for p, r in zip(encoded, drawn, strict=True)], scores[:, 0].tolist()]

        rows, scores = rounds.once("rollouts", "drawing", draw)
        examples = [Example(tuple(prompt), tuple(response)) for prompt, response in rows]
        mean_reward = sum(scores) / len(scores)
        rounds.stopped = any(m.stop(mean_reward) for m in mitigations)
        if index == 0:
            nn.init.constant_(head.linear.bias, mean_reward)

        # 2. What the policy, the reference and the value head say of every token, and the advantages.
        model.eval()
        with torch.no_grad():
            seen = examples, settings.micro_batch_size, settings.drawing.temperature
            logprobs_NC, values_NC, mask_NC = score_tokens(model, head, *seen)
            reference_NC, _, _ = score_tokens(reference, None, *seen)
        log_ratio_NC = logprobs_NC - reference_NC.to(logprobs_NC)  # which may lie on another device
        rewards_NC = -kl * log_ratio_NC
        rewards_NC[:, -1] += torch.tensor(scores, dtype=rewards_NC.dtype, device=rewards_NC.device)
        advantages_NC, returns_NC = gae(rewards_NC, values_NC, mask_NC, settings.discount, settings.trace)
        rollout = Rollout(examples, logprobs_NC, whiten(advantages_NC, mask_NC), returns_NC, values_NC)

        # 3. Epochs of minibatch steps on the clipped objective.
        losses, stage = [TokenLosses(0.0, 0.0, 0.0, 0)], rounds.stage("training")
        for epoch in range(0 if rounds.stopped else epochs):
            shuffled = rounds.order.sample(range(len(examples)), len(examples))
            for start in range(0, len(shuffled), batch_size):
                batch = shuffled[start : start + batch_size]
                losses += update(*learner, rollout, batch, settings, mitigations)
                if stage is not None:
                    stage(epoch * len(examples) + start + len(batch), epochs * len(examples))

        # 4. Tell, adapt the penalty, keep.
        observed_kl = float(log_ratio_NC.sum(1).mean())
        *sums, tokens = sum_over_ranks([sum(column) for column in zip(*losses, strict=True)])
        policy, value, clipped = (each / (tokens or 1) for each in sums)
        length = response_tokens(examples) / len(examples)
        history.append(Round(index, mean_reward, observed_kl, kl, policy, value, clipped, length))
        if settings.kl_target is not None:
            kl = adapted(kl, observed_kl, settings.kl_target, len(examples))
        heads = {"head": head.state_dict(), "head_optimizer": head_optimizer.state_dict()}
        rounds.save(asdict(history[-1]), kl=kl, **heads)
    stepping.finish_all(mitigations, model)
    return history


class ValueHead(nn.Module):
    """The expected return before each token: a linear map of the policy's last hidden state, zero at first.

    Its weights are float32 or wider: in bfloat16 no step of the usual size would move a bias of the size of a reward.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        like = next(iter(stepping.trainable(model).values()))
        width: int = model.config.get_text_config().hidden_size  # type: ignore[operator,union-attr]
        self.linear = nn.Linear(width, 1, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_BCH: Tensor) -> Tensor:
        """Values before each token, (B, C)."""
        return self.linear(hidden_BCH.to(self.linear.weight.dtype))[..., 0]  # type: ignore[no-any-return]


def score_tokens(
    model: nn.Module, head: ValueHead | None, examples: Sequence[Example], batch_size: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and values of every response token, and the mask, each (N, C); values are 0 without a head."""
    lengths_N = torch.tensor([len(e.response) for e in examples], device=device_of(model))
    longest = int(lengths_N.max())
    mask_NC = torch.arange(longest, device=lengths_N.device) >= longest - lengths_N[:, None]
    logprobs_NC, values_NC = (torch.zeros(mask_NC.shape, device=mask_NC.device) for _ in range(2))
    for rows in stepping.rows_of(model, examples, batch_size):
        scored = score_responses(model, [examples[i] for i in rows], hidden=head is not None)
        if not rows.weight:
            continue
        width = scored.mask_BC.shape[1]
        logprobs_NC[rows, -width:] = scored.logprobs(temperature).to(logprobs_NC)
        if head is not None and scored.hidden_BCH is not None:
            values_NC[rows, -width:] = (head(scored.hidden_BCH) * scored.mask_BC).to(values_NC)
    return processes.add_up(logprobs_NC), processes.add_up(values_NC), mask_NC


class TokenLosses(NamedTuple):
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
    settings: PPO,
    mitigations: Sequence[Mitigation],
) -> list[TokenLosses]:
    """One step of both optimisers on the responses `batch`: the mean over their tokens of both losses.

    Returns the losses of each micro-batch of this process; one that is not finite is a ValueError.
    """
    losses: list[TokenLosses] = []
    examples = [rollout.examples[i] for i in batch]
    tokens = response_tokens(examples)

    def backward(rows: processes.Rows) -> None:
        scored = score_responses(model, [examples[i] for i in rows], hidden=True)
        assert scored.hidden_BCH is not None
        mask = scored.mask_BC
        whole = [batch[i] for i in rows]

        def drawn(values_NC: Tensor) -> Tensor:
            return values_NC[whole, -mask.shape[1] :][mask]

        logprobs, old = scored.logprobs(settings.drawing.temperature)[mask], drawn(rollout.logprobs)
        policy = policy_loss(logprobs, old, drawn(rollout.advantages), settings.clip).sum()
        values, returns = head(scored.hidden_BCH)[mask], drawn(rollout.returns)
        value = value_loss(values, drawn(rollout.values), returns, settings.value_clip).sum()
        loss = rows.weight * (policy + settings.value_weight * value) / tokens
        if rows.weight and not math.isfinite(loss.item()):
            raise ValueError(
                f"ppo: expected a finite loss, found {policy.item()} of the policy and {value.item()} of the value head; "
                "lower the learning rates, or check the model's weights"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        outside = ((logprobs - old).exp() - 1).abs() > settings.clip
        if rows.weight:
            losses.append(TokenLosses(policy.item(), value.item(), float(outside.sum()), int(mask.sum())))

    stepping.take_step(model, optimizer, examples, backward, settings.micro_batch_size, mitigations)
    processes.add_up_gradients(head.parameters())
    clip_norm(list(head.parameters()), stepping.CLIP)
    head_optimizer.step()
    head_optimizer.zero_grad(set_to_none=True)
    return losses
