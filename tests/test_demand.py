"""The pick is held to what was demanded of it, as far as the prompts can tell."""

from __future__ import annotations

import numpy as np
import pytest

from counterpoise.statistics.demand import POWER, WITHIN, surest, would_do


def world(shares: list[float], n: int, seed: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Steps and gain of candidates that truly keep these shares of a gain of 1; prompts are easy or hard for all."""
    random = np.random.default_rng([seed, n])
    common, own = random.normal(size=(n, 1)), random.normal(size=(n, len(shares) + 1))
    x = np.array([1.0, *shares]) + noise * (0.6 * common + 0.8 * own)
    return x[:, 1:], x[:, 0]


def picks(shares: list[float], n: int, confidence: float, samples: int = 200) -> tuple[int, int, int]:
    """How many picks are sure, how many of these miss by more than five points, and how many of all picks do."""
    worth = 1 - np.array(shares)  # the less is kept of the reward, the more of the abilities
    sure = wrong = missed = 0
    for seed in range(samples):
        found = surest(*world(shares, n, seed), worth, 0.9, confidence, resamples=300)
        miss = found.which is not None and shares[found.which] < 0.9 - WITHIN
        sure, wrong, missed = sure + found.sure, wrong + (found.sure and miss), missed + miss
    return sure, wrong, missed


@pytest.mark.parametrize("n", [40, 150])
def test_the_best_of_many_noisy_candidates_is_held_to_a_joint_bound(n: int) -> None:
    """Ten candidates that miss and two that do not: the sample's word falls for the first, the bound does not."""
    shares = [0.8] * 10 + [0.95, 1.0]
    _, _, by_word = picks(shares, n, 0.0)
    _, wrong, missed = picks(shares, n, 0.9)
    assert by_word > 60  # of 200
    assert wrong <= 20
    assert missed < by_word / 2


def test_with_plenty_of_prompts_the_bound_costs_nothing() -> None:
    shares = [0.8, 0.92, 0.97]
    found = [surest(*world(shares, 8000, seed, 0.5), 1 - np.array(shares), 0.9, 0.9) for seed in range(5)]
    assert [(f.which, f.sure, f.would_do) for f in found] == [(1, True, None)] * 5


def test_where_none_is_sure_the_surest_is_taken_at_twice_the_risk_and_as_many_prompts_as_it_names_do() -> None:
    shares = [0.6, 0.93]
    found = [surest(*world(shares, 60, seed), np.array([0.4, 0.07]), 0.9, 0.9, resamples=300) for seed in range(60)]
    unsure = [f for f in found if f.which == 1 and not f.sure]
    nothing = [f for f in found if f.which is None and f.would_do is not None]
    assert min(len(unsure), len(nothing)) > 5
    assert all(f.would_do is not None and f.would_do > 60 for f in unsure)
    at_80 = [surest(*world(shares, 60, seed), np.array([0.4, 0.07]), 0.9, 0.8, resamples=300) for seed in range(60)]
    assert [f.which is None for f in found] == [not f.sure for f in at_80]
    steps, gain = world(shares, 4000, 0)
    needed = would_do(float(np.std(steps[:, 1] - 0.85 * gain)), 0.9)
    needed = int(needed * (WITHIN / 0.08) ** 2)  # it truly keeps 0.08 above what would be a miss
    sure = sum(
        surest(*world(shares, needed, s), np.array([0.4, 0.07]), 0.9, 0.9, resamples=300).sure for s in range(60)
    )
    assert sure >= 60 * (POWER - 0.15)


def test_nothing_is_taken_that_does_not_keep_the_share_in_the_sample() -> None:
    steps, gain = world([0.3, 0.5], 200, 0, 0.2)
    assert surest(steps, gain, [1, 2], 0.9, 0.9) == (None, False, None)
    assert surest(steps[:, :0], gain, [], 0.9, 0.9) == (None, False, None)


def test_without_variance_the_sample_is_the_truth() -> None:
    gain = np.ones(10)
    assert surest(np.outer(gain, [0.95, 0.5, 0.97]), gain, [2, 3, 1], 0.9, 0.99) == (0, True, None)


def test_a_reward_that_does_not_vary_needs_two_items_not_none() -> None:
    assert would_do(0.0, 0.9) == would_do(0.5, 0.0) == 2
