"""PPO: its mathematics against hand and finite differences, and known optima that it must reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st

from counterpoise.alignment.mitigations.less import RewardBudget
from counterpoise.alignment.ppo import ValueHead, ppo, score_tokens
from counterpoise.alignment.ppo_losses import adapted, gae, policy_loss, value_loss, whiten
from counterpoise.alignment.settings import PPO
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import Example, continuation_logprobs, score_responses
from tiny import tiny, tokenizer

PROMPTS = [Prompt((("user", text),)) for text in ("abc", "hello", "what?", "one two", "z", "go on", "dsa", "qwer")]
ON = torch.ones(1, 3, dtype=torch.bool)
QUICK = {"prompts_per_iteration": 32, "micro_batch_size": 32, "learning_rate": 5e-3}


def share_of_a(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [r.count("a") / 4 for r in responses]


def lengths(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [10.0 * len(r) for r in responses]


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, -1.0, 2.0]]), torch.tensor([[0.5, 1.0, -0.5]])
    # gamma 0.9, lambda 0.5, from the end: d3 = 2 + 0.5; d2 = -1 - 0.45 - 1; d1 = 0.9 - 0.5
    third, second, first = 2.5, -2.45 + 0.45 * 2.5, 0.4 + 0.45 * (-2.45 + 0.45 * 2.5)
    advantages, returns = gae(rewards, values, ON, 0.9, 0.5)
    assert advantages[0].tolist() == pytest.approx([first, second, third])
    assert returns[0].tolist() == pytest.approx([first + 0.5, second + 1.0, third - 0.5])


def test_gae_with_trace_1_is_the_return_less_the_value_and_ignores_padding_in_front() -> None:
    rewards, values = torch.tensor([[0.0, 1.0, 2.0, 4.0]]), torch.tensor([[0.0, 0.3, 0.2, 0.1]])
    mask = torch.tensor([[False, True, True, True]])
    advantages, returns = gae(rewards, values, mask, 0.5, 1.0)
    assert returns[0].tolist() == pytest.approx([0.0, 1 + 1 + 1, 2 + 2, 4])
    short, _ = gae(rewards[:, 1:], values[:, 1:], ON, 0.5, 1.0)
    assert torch.equal(advantages[:, 1:], short)
    assert advantages[0, 0] == 0


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.05, 0.5))
def test_the_gradient_of_the_clipped_objective_is_that_of_finite_differences(seed: int, clip: float) -> None:
    random = torch.Generator().manual_seed(seed)
    old, new, advantages = (torch.randn(6, generator=random, dtype=torch.float64) * 0.3 for _ in range(3))
    ratio = (new - old).exp()
    far = ((ratio - (1 + clip)).abs() > 1e-4) & ((ratio - (1 - clip)).abs() > 1e-4)  # away from the kinks
    new = new.requires_grad_(True)
    policy_loss(new, old, advantages, clip).sum().backward()
    h = 1e-6
    for i in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[i] = h
        up, down = (policy_loss(new.detach() + s, old, advantages, clip).sum() for s in (step, -step))
        if far[i]:
            assert new.grad[i].item() == pytest.approx(((up - down) / (2 * h)).item(), abs=1e-6)


def test_the_clipped_objective_stops_pushing_where_the_ratio_has_gone_far_enough() -> None:
    new = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = policy_loss(new, torch.zeros(4), advantages, 0.2)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([-1.2, math.exp(0.5), -math.exp(-0.5), 0.8])
    assert [g == 0 for g in new.grad.tolist()] == [True, False, False, True]


def test_the_value_loss_is_the_larger_of_clipped_and_plain() -> None:
    values, old, returns = torch.tensor([1.0, 0.1]), torch.zeros(2), torch.tensor([1.0, 1.0])
    assert value_loss(values, old, returns, None).tolist() == pytest.approx([0.0, 0.405])
    assert value_loss(values, old, returns, 0.2).tolist() == pytest.approx([0.32, 0.405])


def test_whitened_advantages_have_mean_0_and_variance_1_over_tokens() -> None:
    mask = torch.tensor([[True, True, True], [False, False, True]])
    white = whiten(torch.tensor([[1.0, 2.0, 3.0], [9.0, 9.0, 6.0]]), mask)
    assert white[mask].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert white[mask].var(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert (white[~mask] == 0).all()
    assert torch.isfinite(whiten(torch.ones(1, 3), ON)).all()  # all equal


def test_the_adaptive_weight_moves_towards_the_target() -> None:
    assert adapted(0.1, 12.0, 6.0, 1000) == pytest.approx(0.1 * 1.02)
    assert adapted(0.1, 0.0, 6.0, 1000) == pytest.approx(0.1 * 0.98)
    assert adapted(0.1, 6.0, 6.0, 1000) == 0.1


def test_per_token_log_probabilities_are_those_of_scoring_each_response_on_its_own() -> None:
    model = tiny("llama").double()
    examples = [Example((1, 5), (6, 7, 8)), Example((1, 9, 4, 5), (6,)), Example((1,), (9, 9, 9, 2))]
    scored = score_responses(model, examples)
    logprobs, values, mask = score_tokens(model, ValueHead(model), examples, 2, 1.0)
    alone = continuation_logprobs(model, [e.prompt for e in examples], [[e.response] for e in examples])
    assert scored.logprobs().sum(1).tolist() == pytest.approx([a[0] for a in alone])
    assert logprobs.sum(1).tolist() == pytest.approx([a[0] for a in alone], rel=1e-5)
    assert mask.sum(1).tolist() == [3, 1, 4]
    assert (values == 0).all()
    cold = score_responses(model, examples[:1]).logprobs(0.5)
    assert cold.exp()[0, 0].item() == pytest.approx(
        (score_responses(model, examples[:1]).logits_BCV[0, 0] * 2).softmax(-1)[6].item()
    )


def test_ppo_learns_to_say_the_rewarded_letter_and_nothing_else() -> None:
    model = tiny("llama")
    history = ppo(
        model,
        tokenizer(),
        PROMPTS * 4,
        share_of_a,
        PPO(drawing=Drawing(max_new_tokens=4), iterations=30, batch_size=16, value_learning_rate=1e-2, kl=0.0, **QUICK),
    )
    assert history[0].reward < 0.1
    assert history[-1].reward > 0.95  # the optimum is 1: "aaaa"
    assert history[0].kl == 0.0
    assert history[-1].value_loss < 0.05


def test_ppo_with_a_kl_penalty_reaches_the_known_optimum_of_reward_less_kl() -> None:
    weight = 0.25
    model, pre, words = tiny("llama"), tiny("llama"), tokenizer()
    letter = words("a")["input_ids"][-1]
    prompts = PROMPTS[:1]
    one = Drawing(max_new_tokens=1)
    settings = PPO(drawing=one, iterations=60, value_learning_rate=3e-2, epochs=4, kl=weight, **QUICK)
    ppo(model, words, prompts * 32, lambda p, r: [float(x == "a") for x in r], settings, reference=pre)
    ids = torch.tensor([words("abc")["input_ids"]])
    before, after = (m(ids).logits[0, -1].detach().log_softmax(-1) for m in (pre, model))
    q, p = before[letter].exp().item(), after[letter].exp().item()
    lifted = 1 + q * (math.exp(1 / weight) - 1)
    best = q * math.exp(1 / weight) / lifted  # argmax E[r] - weight KL in closed form; its value is weight log(lifted)
    assert 0.3 < best < 0.7
    assert q < 0.05
    assert p == pytest.approx(best, abs=0.12)
    objective = p - weight * (after.exp() * (after - before)).sum().item()
    assert 0.93 < objective / (weight * math.log(lifted)) <= 1.0


@pytest.mark.parametrize(("constant", "dtype"), [(5.0, torch.float32), (-5.3, torch.float32), (5.3, torch.bfloat16)])
def test_a_constant_reward_leaves_the_policy_where_it_was(constant: float, dtype: torch.dtype) -> None:
    model = tiny("llama", dtype=dtype)
    settings = {
        "iterations": 3,
        "prompts_per_iteration": 16,
        "batch_size": 8,
        "drawing": Drawing(max_new_tokens=6),
        "kl": 0.0,
    }
    history = ppo(
        model, tokenizer(), PROMPTS * 2, lambda p, r: [constant] * len(r), PPO(learning_rate=1e-2, **settings)
    )
    for a, b in zip(model.parameters(), tiny("llama", dtype=dtype).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # 12 steps of 1e-2
    assert history[-1].value_loss < 1e-6


def test_the_gradients_of_the_value_head_do_not_scale_those_of_the_policy_down() -> None:
    def aligned(weight: float) -> list[torch.Tensor]:
        model = tiny("llama")
        settings = {"iterations": 2, "prompts_per_iteration": 8, "batch_size": 4, "drawing": Drawing(max_new_tokens=4)}
        # A head that stays zero sends no gradient into the policy: only clipping could tie them.
        still = {"value_weight": weight, "value_learning_rate": 0.0, "learning_rate": 1e-2}
        ppo(model, tokenizer(), PROMPTS, lengths, PPO(**settings, **still))
        return list(model.parameters())

    for a, b in zip(aligned(0.0), aligned(10.0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    model = tiny("llama")
    with pytest.raises(
        ValueError, match=f"temperature: expected a positive number, found {temperature}; .* leave it at 1"
    ):
        ppo(
            model,
            tokenizer(),
            PROMPTS,
            share_of_a,
            PPO(drawing=Drawing(max_new_tokens=2, temperature=temperature), iterations=1),
        )


def test_a_loss_that_is_not_finite_stops_training() -> None:
    settings = {"iterations": 1, "prompts_per_iteration": 8, "batch_size": 4, "drawing": Drawing(max_new_tokens=4)}
    with pytest.raises(
        ValueError, match=r"ppo: expected a finite loss, found nan of the policy .*; lower the learning"
    ):
        ppo(tiny("llama"), tokenizer(), PROMPTS, lengths, PPO(learning_rate=1e30, **settings))


def test_the_same_seed_gives_the_same_model_and_micro_batches_do_not_change_it() -> None:
    def aligned(micro: int) -> list[torch.Tensor]:
        model = tiny("llama", dtype=torch.float64)
        sizes = {"prompts_per_iteration": 16, "batch_size": 4, "micro_batch_size": micro, "learning_rate": 1e-3}
        ppo(
            model,
            tokenizer(),
            PROMPTS * 2,
            lengths,
            PPO(drawing=Drawing(max_new_tokens=4), iterations=1, epochs=1, **sizes),
        )
        return list(model.parameters())

    first, again, small = aligned(8), aligned(8), aligned(1)
    for a, b, c in zip(first, again, small, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)


def test_the_kl_weight_is_adapted_between_rounds() -> None:
    settings = {
        "iterations": 3,
        "prompts_per_iteration": 8,
        "learning_rate": 1e-3,
        "drawing": Drawing(max_new_tokens=4),
    }
    weights = [
        r.kl_weight for r in ppo(tiny("llama"), tokenizer(), PROMPTS, share_of_a, PPO(kl_target=5.0, **settings))
    ]
    assert weights[0] == 0.1
    assert all(b < a for a, b in pairwise(weights))  # the KL is near 0, the target is not


def test_a_reward_budget_ends_training_with_the_model_that_reached_it() -> None:
    model = tiny("llama")
    settings = {"prompts_per_iteration": 8, "learning_rate": 1e-3, "drawing": Drawing(max_new_tokens=4)}
    history = ppo(model, tokenizer(), PROMPTS, share_of_a, PPO(**settings), mitigations=[RewardBudget(-1.0)])
    assert len(history) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny("llama").parameters(), strict=True))
