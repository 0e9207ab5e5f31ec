"""Fronts, volumes and bootstrap intervals against brute force, scipy and sacrebleu."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import kstest, ttest_1samp

from counterpoise.statistics.bootstrap import (
    bootstrap_weights,
    interval,
    paired,
    paired_difference,
    paired_replicates,
    score,
)
from counterpoise.statistics.front import areas, front

# Few values, so that ties and copies are common.
POINTS = st.tuples(st.integers(0, 9), st.integers(1, 4)).flatmap(
    lambda shape: arrays(float, shape, elements=st.integers(-3, 3).map(float))
)


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


@settings(max_examples=300)
@given(POINTS)
def test_front_is_what_nothing_dominates(points: np.ndarray) -> None:
    wanted = [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]
    assert front(points).tolist() == wanted


def test_front_by_hand() -> None:
    assert front([[1, 3], [2, 2], [2, 1], [3, 1], [2, 2], [0, 3]]).tolist() == [0, 1, 3, 4]


def area(points: list[list[float]] | np.ndarray) -> float:
    return float(areas(*np.transpose(points)[:, None])[0])


def test_an_area_by_hand() -> None:
    assert area([[3, 1], [2, 2], [1, 3]]) == 6  # columns of height 3, 2 and 1
    assert area([[2, 1], [1, 2], [0, 3]]) == 3  # the third point adds nothing
    assert area([[1, -1]]) == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6).flatmap(lambda n: arrays(float, (n, 2), elements=st.integers(-3, 3).map(float))))
def test_an_area_is_inclusion_and_exclusion(points: np.ndarray) -> None:
    above = np.maximum(points, 0)  # a point not above the corner gets an edge of 0, so its boxes are empty
    wanted = sum(
        (-1) ** (size + 1) * above[list(chosen)].min(0).prod()
        for size in range(1, len(points) + 1)
        for chosen in itertools.combinations(range(len(points)), size)
    )
    assert area(points) == pytest.approx(wanted, abs=1e-9)


def test_an_area_is_the_share_of_random_points_below() -> None:
    random = np.random.default_rng(2)
    points, drawn = random.uniform(size=(12, 2)), random.uniform(size=(100_000, 2))
    share = (drawn[:, None, :] <= points[None]).all(2).any(1).mean()
    assert area(points) == pytest.approx(share, abs=4 * 0.5 / 100_000**0.5)
    assert area(points[front(points)]) == pytest.approx(area(points), abs=1e-12)


def test_with_many_items_the_interval_is_students() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=2000)
    ours, theirs = interval(values[:, None], "mean", resamples=20_000), ttest_1samp(values, 0).confidence_interval()
    assert ours.value == pytest.approx(values.mean(), rel=1e-12)
    np.testing.assert_allclose(ours[1:3], theirs, atol=0.12 * ours.standard_error)
    assert ours.standard_error == pytest.approx(values.std(ddof=1) / 2000**0.5, rel=0.02)


@pytest.mark.parametrize("items", [16, 100])
@pytest.mark.parametrize("world", ["normal", "skewed", "ratio", "difference"])
def test_intervals_hold_the_truth_as_often_as_they_say(world: str, items: int) -> None:
    random, held = np.random.default_rng([items, 7]), []
    for _ in range(600):
        x, y = random.exponential(size=(2, items))
        if world == "difference":
            found = paired_difference((x + y)[:, None], (1.5 * y)[:, None], "mean", resamples=1000)[1:3]
        elif world == "ratio":
            found = interval(np.stack([x * (1 + y), 1 + y], 1), "ratio", resamples=1000)[1:3]
        else:
            values = random.normal(size=items) if world == "normal" else x
            found = interval(values[:, None], "mean", resamples=1000)[1:3]
        truth = {"normal": 0.0, "skewed": 1.0, "ratio": 1.0, "difference": 0.5}[world]
        held.append(found[0] <= truth <= found[1])
    assert 0.93 - 0.015 <= np.mean(held) <= 0.975  # 600 samples: a standard error of 0.01


@pytest.mark.parametrize("aggregate", ["mean", "ratio", "bleu"])
def test_the_error_of_a_score_is_the_jackknifes(aggregate: str) -> None:
    random = np.random.default_rng(3)
    totals = np.sort(random.integers(5, 30, size=(300, 4)))[:, ::-1]
    bleu = np.hstack([totals[:, :1], totals[:, :1] + 2, random.binomial(totals, [0.8, 0.6, 0.4, 0.3]), totals])
    items = {"mean": random.gamma(1.0, size=(300, 1)), "ratio": random.gamma(2.0, size=(300, 2)), "bleu": bleu}[
        aggregate
    ]
    other = np.roll(items, 1, axis=0) * 1.1
    left = [score(np.delete(items, i, 0), aggregate) - score(np.delete(other, i, 0), aggregate) for i in range(300)]
    ours = paired(items, other, aggregate)
    assert ours.error == pytest.approx(300**0.5 * np.std(left), rel=0.02)
    assert ours.errors.mean() == pytest.approx(ours.error, rel=0.05)


def test_very_many_items_are_resampled_in_groups_with_the_same_spread() -> None:
    values = np.random.default_rng(6).exponential(size=(100_000, 1))
    found = interval(values, "mean")
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.standard_error == pytest.approx(values.std() / 100_000**0.5, rel=0.05)


def test_p_is_below_a_twentieth_just_when_the_interval_leaves_zero_out() -> None:
    random = np.random.default_rng(5)
    for _ in range(50):
        found = paired_difference(random.exponential(size=(20, 1)), np.full((20, 1), 0.65), "mean")
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0) or abs(found.p - 0.05) < 2e-3


def test_a_resample_draws_as_many_items_as_there_are() -> None:
    weights = bootstrap_weights(5, 4000, 0)
    assert (weights.sum(1) == 5).all()
    assert weights[:, 2].mean() == pytest.approx(1, abs=0.06)
    assert weights[:, 2].var() == pytest.approx(0.8, abs=0.08)  # binomial: 5 * 1/5 * 4/5


def test_the_interval_is_repeatable_and_moves_with_the_seed() -> None:
    values = np.random.default_rng(2).normal(size=(50, 1))
    assert interval(values, "mean") == interval(values, "mean")
    assert interval(values, "mean", seed=1) != interval(values, "mean")


def test_a_real_difference_has_a_small_p_because_the_items_are_paired() -> None:
    random = np.random.default_rng(3)
    items = 10 * random.normal(size=200)
    a, b = items + 0.3 + 0.5 * random.normal(size=200), items
    found = paired_difference(a[:, None], b[:, None], "mean")
    assert found.value == pytest.approx((a - b).mean())
    error = (a - b).std(ddof=1) / 200**0.5  # the items' own spread, 10, does not enter
    np.testing.assert_allclose([found.low, found.high], found.value + np.array([-1.96, 1.96]) * error, atol=0.3 * error)
    assert found.p == 2 / 2001
    backwards = paired_difference(b[:, None], a[:, None], "mean")
    assert (backwards.value, backwards.low, backwards.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert backwards.p == found.p


def test_p_is_uniform_when_there_is_no_difference() -> None:
    random = np.random.default_rng(4)
    p = [paired_difference(*random.normal(size=(2, 60, 1)), "mean", resamples=999).p for _ in range(300)]
    assert kstest(p, "uniform").pvalue > 0.01
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.09


def test_a_model_against_itself_has_p_one() -> None:
    values = np.random.default_rng(5).normal(size=(20, 1))
    assert paired_difference(values, values, "mean") == (0, 0, 0, 1)
    assert not paired_replicates(values, values, "mean").any()


# Sentences short enough for zero counts: BLEU's smoothing has something to do.
WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat"]), min_size=1, max_size=9).map(" ".join)


def bleu_row(answer: str, reference: str) -> list[int]:
    """Lengths, clipped matches and totals of n-grams, counted here."""
    a, r = answer.split(), reference.split()
    grams = [[Counter(zip(*(s[i:] for i in range(n)), strict=False)) for s in (a, r)] for n in range(1, 5)]
    hits = [sum((x & y).values()) for x, y in grams]
    return [len(a), len(r), *hits, *(x.total() for x, _ in grams)]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
def test_bleu_is_sacrebleus(pairs: list[tuple[str, str]]) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    answers, references = map(list, zip(*pairs, strict=True))
    wanted = sacrebleu.corpus_bleu(answers, [references], tokenize="none").score
    rows = np.array([bleu_row(*pair) for pair in pairs])
    assert score(rows, "bleu") == pytest.approx(wanted, abs=1e-9)


def test_scores_by_hand() -> None:
    assert score([[1.0], [2.0], [6.0]], "mean") == 3
    assert score([[-4.0, 1.0], [-2.0, 5.0]], "ratio") == -1  # six nats over six tokens, not the mean of -4 and -0.4


@pytest.mark.parametrize(("statistics", "aggregate", "found"), [
    ([[1.0], [float("nan")]], "mean", r"finite statistics .* found shape \(2, 1\)"),
    ([1.0, 2.0], "mean", r"shape \(items, d\) .* found shape \(2,\)"),
    (np.empty((0, 1)), "mean", r"at least one item, found shape \(0, 1\)"),
    ([[1.0]], "median", "expected mean, ratio or bleu, found 'median'"),
])  # fmt: skip
def test_bad_statistics_are_refused(statistics, aggregate: str, found: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=found):
        interval(statistics, aggregate)


def test_other_items_and_infinite_points_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the same items on both sides, found shapes \(2, 1\) and \(3, 1\)"):
        paired_difference([[1.0]] * 2, [[1.0]] * 3, "mean")
    with pytest.raises(ValueError, match="finite points"):
        front([[1.0, np.inf]])
