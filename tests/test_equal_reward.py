"""Reward-matched differences: by hand, by properties, and on data whose answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from counterpoise.statistics.equal_reward import (
    Fronts,
    Matched,
    ModelStatistics,
    PointAndCurve,
    Statistics,
    hypervolume_gain,
    meeting,
    reward_matched,
)
from counterpoise.statistics.front import areas

NUMBERS = st.floats(-3, 3).map(lambda v: round(v, 3))
CURVES = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=6)


def scored(reward: list[float], *abilities: list[float]) -> ModelStatistics:
    return ModelStatistics(
        Statistics(np.array(reward)[:, None]), tuple(Statistics(np.array(a)[:, None]) for a in abilities)
    )


def test_by_hand() -> None:
    # The curve: reward 0, 1, 2 with ability 10, 8, 2. At reward 1.5 it keeps 5; the point keeps 6.
    curve = [scored([0, 0], [9, 11]), scored([0.5, 1.5], [7, 9]), scored([2, 2], [1, 3])]
    found = reward_matched([PointAndCurve(scored([1, 2], [5, 7]), curve)])
    assert isinstance(found, Matched)
    assert found.value == 1.0
    assert found.by_run == (1.0,)
    # Every resample of the abilities shifts point and curve alike, by -1, 0 or 1. Rewards: point and middle shift by
    # -0.5, 0 or 0.5. At +0.5 the point has the end's reward 2: 6 - 2 = 4; at -0.5 the middle is at 0.5, the point at 1:
    # a third of the way from 8 to 2 is 6: 0.
    assert (found.low, found.high) == pytest.approx((0.0, 4.0), abs=1e-12)
    assert found.outside == 0.0


def test_several_abilities_are_scaled_and_averaged() -> None:
    curve = [scored([0, 0], [10, 10], [1, 1]), scored([2, 2], [0, 0], [0, 0])]
    found = reward_matched([PointAndCurve(scored([1, 1], [7, 7], [0.4, 0.4]), curve)], (2.0, 0.1))
    assert found is not None
    assert found.value == pytest.approx(((7 - 5) / 2 + (0.4 - 0.5) / 0.1) / 2)
    assert found.low == found.high == pytest.approx(found.value)


def test_runs_are_averaged_and_those_out_of_reach_are_told() -> None:
    curve = [scored([0, 0], [4, 4]), scored([1, 1], [0, 0])]
    points = [scored([0.5, 0.5], [3, 3]), scored([0.5, 0.5], [6, 6]), scored([1.5, 1.5], [3, 3])]
    found = reward_matched([PointAndCurve(p, curve) for p in points])
    assert found is not None
    assert found.by_run == (1.0, 4.0, None)
    assert found.value == 2.5
    assert reward_matched([PointAndCurve(points[2], curve)]) is None


@settings(max_examples=200)
@given(CURVES, st.floats(0, 0.999), st.integers(0, 4))  # at 1, rounding may leave the end of the curve outside
def test_a_point_of_the_curve_is_never_better_than_it(curve: list[tuple[float, float]], share: float, at: int) -> None:
    a, b = curve[at % (len(curve) - 1)], curve[at % (len(curve) - 1) + 1]
    here = np.array(a) + share * (np.array(b) - a)
    x, y = (np.array([c[i] - here[i] for c in curve])[None] for i in (0, 1))
    value, inside = meeting(x, y)
    if abs(a[0] - b[0]) > 1e-6:
        assert not inside[0] or value[0] >= -1e-6 * (1 + abs(a[1] - b[1]) / abs(a[0] - b[0]))
    if sorted(c[0] for c in curve) == [c[0] for c in curve] and min(np.diff([c[0] for c in curve])) > 1e-2:
        assert value[0] == pytest.approx(0, abs=1e-9)  # a curve that is a function of the reward


@settings(max_examples=200)
@given(CURVES, st.integers(0, 4), st.floats(0.1, 0.9), st.floats(0.1, 10))
def test_what_does_not_matter(curve: list[tuple[float, float]], at: int, share: float, factor: float) -> None:
    x, y = (np.array([c[i] for c in curve])[None] for i in (0, 1))
    value, inside = meeting(x, y)
    backwards = meeting(x[:, ::-1], y[:, ::-1])
    assert backwards[1] == inside
    if inside[0]:
        np.testing.assert_allclose(backwards[0], value, atol=1e-9)
        np.testing.assert_allclose(meeting(factor * x, y)[0], value, atol=1e-9)
    np.testing.assert_allclose(meeting(x, y + 2.5)[0], value + 2.5, atol=1e-9)
    k = at % (len(curve) - 1)
    middle = [(1 - share) * v[0, k] + share * v[0, k + 1] for v in (x, y)]
    more = [np.insert(v, k + 1, m, axis=1) for v, m in zip((x, y), middle, strict=True)]
    if inside[0] and abs(middle[0]) > 1e-6 and (np.abs(np.diff(x)) > 1e-2).all():
        np.testing.assert_allclose(meeting(*more)[0], value, atol=1e-6)


def test_the_interval_covers_what_is_true() -> None:
    """Paired items of two models; truly the point keeps 0.3 more at its reward."""
    covered = 0
    for trial in range(60):
        draw = np.random.default_rng(trial)
        prompts, items = draw.normal(size=150), draw.normal(size=200)

        def model(
            reward: float,
            ability: float,
            draw: np.random.Generator = draw,
            p: np.ndarray = prompts,
            i: np.ndarray = items,
        ) -> ModelStatistics:
            return scored(
                list(reward + p + 0.3 * draw.normal(size=150)), list(ability + 2 * i + 0.3 * draw.normal(size=200))
            )

        curve = [model(r, 5 - 2 * r) for r in (0.0, 0.5, 1.0)]
        found = reward_matched([PointAndCurve(model(0.7, 5 - 1.4 + 0.3), curve)], resamples=400)
        assert found is not None
        covered += found.low <= 0.3 <= found.high
        assert found.high - found.low < 0.4  # unpaired it would be above 0.7: the items' spread is 2
    assert 52 <= covered <= 60


def test_pooling_over_runs_narrows_the_interval() -> None:
    draw = np.random.default_rng(0)

    def run() -> PointAndCurve:
        curve = [scored(list(r + draw.normal(size=80)), list(3 - r + draw.normal(size=80))) for r in (0.0, 2.0)]
        return PointAndCurve(scored(list(1 + draw.normal(size=80)), list(2.2 + draw.normal(size=80))), curve)

    runs = [run() for _ in range(4)]
    one, four = reward_matched(runs[:1]), reward_matched(runs)
    assert one is not None
    assert four is not None
    assert four.high - four.low < 0.7 * (one.high - one.low)
    assert four.value == pytest.approx(np.mean([v for v in four.by_run if v is not None]))
    assert reward_matched(runs) == four


def test_other_items_on_one_side_are_refused() -> None:
    point = scored([1, 1], [1, 1])
    with pytest.raises(ValueError, match="the same items on both sides"):
        reward_matched([PointAndCurve(point, [scored([0, 0, 0], [1, 1]), scored([2, 2, 2], [1, 1])])])


@settings(max_examples=60, deadline=None)
@given(CURVES.filter(lambda c: len(c) <= 7))
def test_an_area_of_fewer_points_is_the_mean_over_all_choices_of_them(points: list[tuple[float, float]]) -> None:
    x, y = (np.array([p[i] for p in points])[None] for i in (0, 1))
    for of in range(1, len(points) + 1):
        every = [areas(*np.transpose(some)[:, None])[0] for some in itertools.combinations(points, of)]
        assert areas(x, y, of)[0] == pytest.approx(np.mean(every), abs=1e-9)


def test_a_front_is_compared_with_as_many_points_of_the_reference_or_not_at_all() -> None:
    pre, post = scored([0, 0], [4, 4]), scored([2, 2], [0, 0])
    one, other = scored([1, 1], [3, 3]), scored([1, 1], [1, 1])
    found = hypervolume_gain([Fronts(pre, post, [one], [one, other])])
    assert found is not None
    assert found.value == pytest.approx((0.375 - 0.125) / 2)  # MA's two points are 0.375 and 0.125 alone
    assert hypervolume_gain([Fronts(pre, post, [one, other], [one])]) is None
    whole = hypervolume_gain([Fronts(pre, post, [one, other], [other, one])])
    assert whole is not None
    assert whole.value == 0


def test_hypervolume_gain_by_hand() -> None:
    # PRE (0, 4), POST (2, 0): the unit is 8. Ours adds (1, 3): in units (0.5, 0.75), area 0.375. Theirs adds (1, 1): 0.125.
    pre, post = scored([0, 0], [4, 4]), scored([2, 2], [0, 0])
    ours, theirs = [scored([1, 1], [2, 4])], [scored([1, 1], [1, 1])]
    found = hypervolume_gain([Fronts(pre, post, ours, theirs)])
    assert found is not None
    assert found.value == pytest.approx(0.25)
    # Ours resampled keeps 2, 3 or 4 of 4: areas 0.25, 0.375, 0.5.
    assert (found.low, found.high) == pytest.approx((0.125, 0.375))
    same = hypervolume_gain([Fronts(pre, post, ours, ours)])
    assert same is not None
    assert same[:3] == (0.0, 0.0, 0.0)
    assert hypervolume_gain([Fronts(post, pre, ours, theirs)]) is None
    both = hypervolume_gain([Fronts(pre, post, ours, theirs), Fronts(pre, post, theirs, theirs)])
    assert both is not None
    assert both.value == pytest.approx(0.125)
