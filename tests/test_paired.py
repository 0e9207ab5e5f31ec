"""Flips, p values of many tasks, and items in groups."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_rel

from counterpoise.statistics.bootstrap import (
    RESAMPLES,
    bootstrap_weights,
    clustered,
    grouped,
    interval,
    paired_difference,
    paired_replicates,
    resampled_difference,
    score,
)
from counterpoise.statistics.paired import MOST, calibration, cells, flips, holm, resampled, stratified


@pytest.mark.parametrize(("lost", "won", "items"), [(0, 0, 30), (5, 0, 40), (9, 3, 50), (700, 600, 5000)])
def test_flips_have_wilsons_intervals_and_mcnemars_p(lost: int, won: int, items: int) -> None:
    found = flips([0, lost, won, items - lost - won])
    for count, key in ((lost, "lost"), (won, "won")):
        wanted = binomtest(count, items).proportion_ci(method="wilson")
        assert found[key]["value"] == 100 * count / items
        assert (found[key]["low"], found[key]["high"]) == pytest.approx((100 * wanted.low, 100 * wanted.high), abs=1e-4)
    assert found["p"] == pytest.approx(binomtest(lost, lost + won).pvalue if lost + won else 1.0)


def guessing(draw: np.random.Generator, items: int, known: tuple[float, float, float], choices: int) -> list[int]:
    """Items that both know, that are lost and won, as the shares `known`; what is not known is guessed, on its own."""
    state = draw.choice(4, size=items, p=[*known, 1 - sum(known)])
    lucky = draw.random((2, items)) < 1 / choices
    return cells((state == 0) | (state == 1) | lucky[0], (state == 0) | (state == 2) | lucky[1]).sum(0)


@pytest.mark.parametrize("choices", [2, 4])
def test_what_guessing_flips_is_taken_off_and_the_intervals_cover(choices: int) -> None:
    """The truth by simulation: of items that are known, 8 % are forgotten (and then guessed), 2 % learned."""
    draw, known = np.random.default_rng(0), (0.5, 0.08, 0.02)
    many = flips(guessing(draw, 2_000_000, known, choices), 1 / choices)
    truth = {key: many[key]["value"] for key in ("lost", "won")}
    assert truth["lost"] - truth["won"] == pytest.approx(100 * (0.08 - 0.02) * (1 - 1 / choices), abs=0.1)
    still = flips(guessing(draw, 2_000_000, (0.0, 0.0, 0.0), choices), 1 / choices)
    assert max(still[key]["value"] for key in ("lost", "won")) < 0.2 < still["by_chance"] - 15
    for items in (100, 400):
        found = [flips(guessing(draw, items, known, choices), 1 / choices) for _ in range(400)]
        covered = np.mean([[f[k]["low"] <= truth[k] <= f[k]["high"] for k in truth] for f in found], axis=0)
        assert all(share > 0.92 for share in covered), covered


def test_items_that_go_together_count_for_as_few_as_they_spread_like() -> None:
    """Four copies of each item say no more than one; items that only share a name count in full."""
    draw = np.random.default_rng(0)
    sides = draw.random((2, 60)) < 0.6
    alone, copies = cells(*sides), cells(*np.repeat(sides, 4, axis=1))
    found, once = flips(copies.sum(0), 0.0, clustered(copies, np.repeat(np.arange(60), 4))), flips(alone.sum(0))
    for way in ("lost", "won"):
        ends = [[f[way]["high"] - f[way]["low"]] for f in (found, once, flips(copies.sum(0)))]
        assert ends[0] == pytest.approx(ends[1], rel=0.03)
        assert ends[2][0] < 0.6 * ends[1][0]
    assert found["p"] == once["p"]
    assert flips(alone.sum(0), 0.0, alone)["lost"]["high"] == pytest.approx(once["lost"]["high"], rel=0.01)
    held = []
    for _ in range(300):
        p = np.repeat(draw.beta(1, 3, 40), 3)  # items of a group are alike
        rows = cells(np.ones(120), draw.random(120) > p)
        lost = flips(rows.sum(0), 0.0, clustered(rows, np.arange(120) // 3))["lost"]
        held.append(lost["low"] <= 25 <= lost["high"])
    assert 0.92 <= np.mean(held) <= 0.985


def test_flips_of_a_group_take_off_what_guessing_flips_in_each_task() -> None:
    tasks, chance = np.array([[30, 9, 4, 17], [10, 2, 6, 22]]), np.array([0.25, 0.5])
    group, each = flips(tasks, chance), [flips(t, c) for t, c in zip(tasks, chance, strict=True)]
    assert group["by_chance"] == pytest.approx((60 * each[0]["by_chance"] + 40 * each[1]["by_chance"]) / 100)
    assert group["lost"]["seen"] == 11
    assert group["lost"]["value"] == max(0.0, 11 - group["by_chance"])
    assert flips(tasks[0], 1 / 3)["by_chance"] == pytest.approx(100 * (21 / 60) * (26 / 60) / 2)  # of the paper


def test_many_items_in_groups_keep_their_score_and_its_interval() -> None:
    draw = np.random.default_rng(0)
    items = np.hstack([draw.normal(3, 1, (6000, 1)), draw.integers(1, 9, (6000, 1))])
    for statistics, aggregate in ((items[:, :1], "mean"), (items, "ratio")):
        few = grouped(statistics, MOST)
        assert few.shape == (MOST, 2)
        assert score(few, aggregate) == pytest.approx(score(statistics, aggregate))
        errors = [interval(s, aggregate).standard_error for s in (few, statistics)]
        assert errors[0] == pytest.approx(errors[1], rel=0.1)
    np.testing.assert_array_equal(grouped(items[:40], MOST), items[:40])


@pytest.mark.parametrize("items", [16, 100])
@pytest.mark.parametrize("world", ["normal", "skewed"])
def test_intervals_of_groups_and_of_clustered_items_hold_the_truth(world: str, items: int) -> None:
    """A mean over three tasks; and items of which up to three share what they have in common."""
    random, held = np.random.default_rng([items, 8]), []

    def draw(many: int) -> np.ndarray:
        return random.normal(size=(many, 1)) if world == "normal" else random.exponential(size=(many, 1)) - 1

    for _ in range(200):
        tasks = [resampled(a + draw(len(a)), a, "mean", s) for s, a in enumerate(map(draw, (items, items, 2 * items)))]
        group = stratified(tasks, (0.25, 0.25, 0.5))[2]
        of = np.repeat(np.arange(items), random.integers(1, 4, items))
        cluster = interval(clustered(draw(items)[of] + draw(len(of)), of), "mean", resamples=1000)
        held.append((group.low <= 0 <= group.high, cluster.low <= 0 <= cluster.high))
    assert (np.mean(held, axis=0) >= 0.93 - 0.03).all()  # 200 samples: two standard errors of 0.016


def test_clusters_keep_the_score_and_widen_its_interval_where_they_share() -> None:
    draw = np.random.default_rng(4)
    of = np.repeat(np.arange(100), 5)
    shared = draw.normal(size=(100, 1))[of]
    assert score(clustered(shared, of), "mean") == pytest.approx(score(shared, "mean"))
    errors = [interval(s, "mean").standard_error for s in (clustered(shared, of), shared)]
    assert errors[0] == pytest.approx(5**0.5 * errors[1], rel=0.1)


def test_p_is_not_held_up_by_the_number_of_resamples() -> None:
    draw = np.random.default_rng(1)
    a = draw.normal(size=(60, 1))
    b = a - 1 + draw.normal(size=(60, 1))
    assert paired_difference(a, b, "mean").p == pytest.approx(2 / 2001)
    assert resampled(a, b, "mean").tax().p == pytest.approx(ttest_rel(a[:, 0], b[:, 0]).pvalue, rel=0.9)
    near = a - 0.1 + draw.normal(size=(60, 1))
    assert resampled(a, near, "mean").tax() == paired_difference(a, near, "mean")
    assert resampled(a, a, "mean").tax().p == 1


def test_holm_bounds_all_tests_together() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
    draw = np.random.default_rng(2)
    called = [min(holm(draw.random(20).tolist())) < 0.05 for _ in range(1000)]
    assert np.mean(called) == pytest.approx(0.05, abs=0.02)


def test_intervals_of_calibration_errors_are_reflected_because_resampling_adds_to_them() -> None:
    """PRE is calibrated, so that its true error is 0; POST is sure of what is right in 30 %, so that it is 65."""
    draw = np.random.default_rng(3)
    covered = []
    for _ in range(40):
        sure = draw.uniform(0.3, 1, 60)
        calibrated = np.stack([sure, draw.random(60) < sure, np.zeros(60)], axis=1)
        boastful = np.stack([np.full(60, 0.95), draw.random(60) < 0.3, np.ones(60)], axis=1)
        found = calibration(calibrated, boastful)
        rise = found["ece"]["rise"]
        covered.append((found["ece"]["pre"]["low"] <= 0, rise["low"] <= 65 <= rise["high"]))
    calm, risen = np.mean(covered, axis=0)
    assert calm > 0.4  # percentiles never reach 0
    assert risen > 0.7  # percentiles: 0.4
    assert found["brier"]["rise"]["value"] == 100


def test_other_numbers_of_items_are_refused_however_many() -> None:
    for items in (50, 5000):
        for compare in (paired_difference, resampled):
            with pytest.raises(ValueError, match="expected the same items on both sides"):
                compare(np.ones((items, 1)), np.ones((items + 10, 1)), "mean")


@pytest.mark.filterwarnings("error")
def test_resamples_that_have_nothing_to_divide_by_count_nowhere() -> None:
    gained, kept = np.repeat([1.0, 0.0], [4, 2]), np.repeat([1.0, 0.0], [2, 4])
    found = interval(np.stack([kept, gained], axis=1), "ratio")
    assert found.value == 0.5
    assert -1 < found.low < 0.5 < found.high < 2
    assert 0 < found.standard_error < 1
    losses, tokens = np.array([[1.0, 0.0, 0.0, 2.0, 0.0], [1.0, 0.0, 0.0, 1.0, 0.0]])
    a, b = np.stack([losses, tokens], axis=1), np.stack([0.01 * losses, tokens], axis=1)
    there = int((bootstrap_weights(5, RESAMPLES, 0) @ tokens > 0).sum())
    assert there < RESAMPLES - 100
    assert paired_difference(a, b, "ratio").p == 2 / (there + 1)
    assert resampled_difference(1.5, paired_replicates(a, b, "ratio")).p == 2 / (there + 1)
