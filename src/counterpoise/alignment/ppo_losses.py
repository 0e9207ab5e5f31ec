"""The mathematics of PPO: advantages, the two losses, the KL weight. Pure functions on tensors.

Shape suffixes: N responses, C response tokens; rows end together, so that padding stands in front of a response.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards_NC: Tensor, values_NC: Tensor, mask_NC: Tensor, discount: float, trace: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (Schulman et al. 2016, equation 16), 0 on padding, which stands in front of a response.

    A_t = d_t + gamma lambda A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t, nothing after the last token; returns are A + V.

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), torch.ones(1, 2, dtype=torch.bool), 1.0, 0.5)
    (tensor([[0.2500, 0.5000]]), tensor([[0.7500, 1.0000]]))
    """
    advantages_NC = torch.zeros_like(rewards_NC)
    later_N = torch.zeros_like(rewards_NC[:, 0])
    next_value_N = torch.zeros_like(later_N)
    for t in reversed(range(rewards_NC.shape[1])):
        error_N = rewards_NC[:, t] + discount * next_value_N - values_NC[:, t]
        later_N = error_N + discount * trace * later_N
        advantages_NC[:, t], next_value_N = later_N, values_NC[:, t]
    return advantages_NC * mask_NC, (advantages_NC + values_NC) * mask_NC


def whiten(values_NC: Tensor, mask_NC: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens of all responses; 0 on padding."""
    counted = values_NC[mask_NC]
    scale = torch.rsqrt(counted.var(correction=0) + 1e-8)
    return (values_NC - counted.mean()) * scale * mask_NC


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """-min(rho A, clip(rho, 1 - c, 1 + c) A) for each token, rho = p / p_old (Schulman et al. 2017, equation 7)."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """(V - R)^2 / 2 for each token, or the larger of it and the same with V kept within `clip` of its old value."""
    loss = (values - returns).square()
    if clip is not None:
        kept = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (kept - returns).square())
    return loss / 2


def adapted(weight: float, observed: float, target: float, responses: int, horizon: int = 10_000) -> float:
    """The KL weight for the next round: times 1 + K e, e the relative error within 0.2 (Ziegler et al. 2019, section 2.2).

    K = n / horizon grows with the n responses of a round, as in their code; the paper prints K = 0.1.

    >>> adapted(0.1, 12.0, 6.0, 1000)
    0.10200000000000001
    """
    error = min(max(observed / target - 1, -0.2), 0.2)
    return weight * (1 + error * responses / horizon)
