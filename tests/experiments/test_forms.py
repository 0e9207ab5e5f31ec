"""Other forms of the alignment side: contrast and the reward itself, against finite differences and known rewards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from forms import FORMS, WeightedSet, contrast
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from on_policy import OnPolicy, advantages, effective_share

from counterpoise.averaging.partition import thirds
from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.rewards import Rated, draw_rated
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing, decode
from counterpoise.language.scoring import row_nlls
from counterpoise.records import Store
from counterpoise.search.both_sides import BothSides
from counterpoise.search.proxies import ProxySet
from counterpoise.search.sides import Likelihood
from counterpoise.search.two_sided import Found, exact, measure
from search.pairs import resident, said
from tiny import tokenizer
from world import early_letters, make, panel

PROMPTS = [Prompt((("user", f"{a}{b}"),)) for a in "abcd" for b in "wxyz"]


@given(arrays(float, (3, 4), elements=st.floats(-5, 5)))
def test_advantages_sum_to_zero_and_keep_the_order(rewards: np.ndarray) -> None:
    found = advantages(rewards)
    np.testing.assert_allclose(found.sum(1), 0, atol=1e-12)
    others = (rewards.sum(1, keepdims=True) - rewards) / 3
    np.testing.assert_allclose(found, rewards - others, atol=1e-12)


def test_a_weighted_set_is_the_weighted_sum_with_its_gradient(tmp_path: Path) -> None:
    model, cut = resident(tmp_path)
    examples = tuple(said(model, cut, 1.0, count=7))
    weights = tuple(np.linspace(-1, 1.5, 7).tolist())
    side = Likelihood(model, cut, WeightedSet(examples, weights, batch_size=3).backward)
    # Llama's norms compute in float32, also in a float64 model: a smaller step would measure their rounding.
    evaluate, r = side.near(np.ones(6)), np.array([0.3, 0.9, 0.1, 0.5, 0.6, 0.2])
    value, gradient = evaluate(r)
    single = [row_nlls(model.model, [e]).item() for e in examples]
    assert value == pytest.approx(np.dot(weights, single) / sum(len(e.response) for e in examples), rel=1e-12)
    h = 1e-3
    numeric = [(evaluate(r + h * e)[0] - evaluate(r - h * e)[0]) / (2 * h) for e in np.eye(6)]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-5)


def test_equal_weights_are_imitation(tmp_path: Path) -> None:
    model, cut = resident(tmp_path)
    examples = tuple(said(model, cut, 1.0, count=5))
    at = np.full(6, 0.4)
    plain = Likelihood(model, cut, ProxySet(examples, 2).backward).near(at)(at)
    same = Likelihood(model, cut, WeightedSet(examples, (1.0,) * 5, 2).backward).near(at)(at)
    assert plain[0] == pytest.approx(same[0], rel=1e-12)
    np.testing.assert_allclose(plain[1], same[1], rtol=1e-9)


def test_the_temperature_is_that_of_the_policy(tmp_path: Path) -> None:
    model, cut = resident(tmp_path)
    [example, *_] = said(model, cut, 1.0, count=1)
    with torch.no_grad():
        logits = model.model(torch.tensor([example.prompt + example.response])).logits[0, len(example.prompt) - 1 : -1]
    wanted = -(logits / 0.5).log_softmax(-1).gather(1, torch.tensor(example.response)[:, None]).sum()
    assert row_nlls(model.model, [example], temperature=0.5).item() == pytest.approx(wanted.item(), rel=1e-10)


@given(arrays(float, 6, elements=st.floats(-30, 30)), st.floats(-500, 500))
def test_the_effective_share_lies_between_one_sample_and_all(logs: np.ndarray, shift: float) -> None:
    assert 1 / 6 - 1e-12 <= effective_share(logs) <= 1 + 1e-12
    assert effective_share(logs + shift) == pytest.approx(effective_share(logs), rel=1e-9)


def reward_side(model, cut, **settings) -> OnPolicy:  # type: ignore[no-untyped-def]
    drawn = {k: settings.pop(k) for k in ("n", "temperature", "seed") if k in settings}
    options = {"groups": 4, "batch_size": 16, **settings}
    drawing = Drawing(**{"n": 4, "max_new_tokens": 5, "batch_size": 8 * options["batch_size"], **drawn})
    return OnPolicy(model, cut, tokenizer(), PROMPTS, early_letters, drawing, **options)


def test_around_its_point_the_reward_is_smooth_and_its_gradient_exact(tmp_path: Path) -> None:
    model, _ = resident(tmp_path, scale=0.03)
    cut = thirds(model.pair.names)
    side, r = reward_side(model, cut), np.array([0.5, 0.5, 0.5])
    evaluate = side.near(r)
    drawn = side.draw(r)
    assert evaluate(r)[0] == pytest.approx(-drawn.rewards.mean(), rel=1e-9)  # all weights are 1
    moved, h = np.array([0.6, 0.45, 0.5]), 1e-3
    numeric = [(evaluate(moved + h * e)[0] - evaluate(moved - h * e)[0]) / (2 * h) for e in np.eye(3)]
    np.testing.assert_allclose(evaluate(moved)[1], numeric, rtol=1e-3, atol=1e-5)


def test_the_policy_gradient_is_that_of_the_expected_reward(tmp_path: Path) -> None:
    """One-token responses: the expectation and its gradient can be summed over the vocabulary."""
    model, _ = resident(tmp_path, scale=0.2)
    cut = thirds(model.pair.names)
    worth = np.random.default_rng(0).normal(size=64)

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(worth[ord(r[0]) % 64]) if r else 0.0 for r in responses]

    words, prompts = tokenizer(), PROMPTS[:4]
    table = torch.tensor(reward([""] * 64, [words.decode([i], skip_special_tokens=True).strip() for i in range(64)]))

    def expected(r: np.ndarray) -> float:
        model.set(cut, r)
        with torch.no_grad():
            last = [model.model(torch.tensor([words(p.text)["input_ids"]])).logits[0, -1] for p in prompts]
        return float(np.mean([x.softmax(-1) @ table.double() for x in last]))

    side = OnPolicy(model, cut, words, prompts, reward, Drawing(n=600, max_new_tokens=1), groups=4, batch_size=400)
    slopes = side.along((0.4, 0.6))
    h = 1e-3
    for t, value, gradient, error in zip(slopes.points, slopes.values, slopes.gradients, slopes.errors, strict=True):
        r = np.full(3, t)
        numeric = [-(expected(r + h * e) - expected(r - h * e)) / (2 * h) for e in np.eye(3)]
        assert value == pytest.approx(-expected(r), abs=0.05)
        spread = np.abs(numeric).max()
        np.testing.assert_allclose(gradient, numeric, atol=0.25 * spread)
        assert (error > 0).all()
    assert [(k.point, k.other, k.used) for k in side.kept] == [(0.4, 0.6, True), (0.6, 0.4, True)]
    assert all(0.5 < k.effective <= 1 for k in side.kept)


def test_neighbours_of_another_mean_reward_leave_no_bias(tmp_path: Path) -> None:
    """What POST says more often than PRE is worth 1: the points' means differ, and so would baselines of their own."""
    model, _ = resident(tmp_path, scale=0.25)
    cut, words, prompts = thirds(model.pair.names), tokenizer(), PROMPTS[:1]
    texts = [words.decode([i], skip_special_tokens=True).strip() for i in range(64)]

    def next_token(r: np.ndarray) -> torch.Tensor:
        model.set(cut, r)
        with torch.no_grad():
            return model.model(torch.tensor([words(prompts[0].text)["input_ids"]])).logits[0, -1].softmax(-1)

    liked = {texts[i] for i in (next_token(np.ones(3)) / next_token(np.zeros(3))).topk(20).indices}

    def expected(r: np.ndarray) -> float:
        return float(sum(p for p, text in zip(next_token(r), texts, strict=True) if text in liked))

    drawing = Drawing(n=2, max_new_tokens=1, batch_size=16000, seed=1)
    rewarded = lambda p, r: [float(x in liked) for x in r]  # noqa: E731
    side = OnPolicy(model, cut, words, prompts * 4000, rewarded, drawing, groups=40, batch_size=2000)
    slopes = side.along((0.0, 1.0))
    assert [k.used for k in side.kept] == [True, True]
    means = [expected(np.full(3, t)) for t in (0.0, 1.0)]
    assert means[1] - means[0] > 0.15
    h = 1e-3
    for t, gradient, error in zip(slopes.points, slopes.gradients, slopes.errors, strict=True):
        numeric = [-(expected(np.full(3, t) + h * e) - expected(np.full(3, t) - h * e)) / (2 * h) for e in np.eye(3)]
        assert (np.abs(gradient - numeric) < 3 * error).all()


def test_far_neighbours_are_refused_and_far_points_are_out_of_reach(tmp_path: Path) -> None:
    model, cut = resident(tmp_path, scale=0.5)
    side = reward_side(model, cut)
    side.along((0.0, 1.0))
    assert [k.used for k in side.kept] == [False, False]
    assert all(k.effective < 0.1 for k in side.kept)
    assert side.near(np.zeros(6))(np.ones(6))[0] == float("inf")


def test_the_search_runs_on_the_reward_and_repeats_itself(tmp_path: Path) -> None:
    model, _ = resident(tmp_path, scale=0.15)
    cut, words = thirds(model.pair.names), tokenizer()
    before, after = ("".join(decode(words, [e.response for e in said(model, cut, r, seed=4)])) for r in (0.0, 1.0))
    liked = {c for c in after if after.count(c) > before.count(c)}  # what POST says more often than PRE
    retention = {"text": Likelihood(model, cut, ProxySet(tuple(said(model, cut, 0.0)), 16).backward)}

    def run() -> list[Found]:
        side = reward_side(model, cut, n=6)
        side.reward = lambda p, r: [float(sum(c in liked for c in x)) for x in r]
        diagonal = measure(side, retention)
        return exact(diagonal, side, retention, [0.5], max_passes=4)

    assert run() == run()


def test_too_little_to_learn_from_is_refused(tmp_path: Path) -> None:
    model, cut = resident(tmp_path)
    with pytest.raises(ValueError, match="n >= 2 and a temperature above 0"):
        reward_side(model, cut, n=1)
    with pytest.raises(ValueError, match="from 2 groups to one a prompt"):
        reward_side(model, cut, groups=99)


def test_the_contrast_weighs_siblings_alone(tmp_path: Path) -> None:
    model, cut = resident(tmp_path)
    model.set(cut, np.ones(6))
    rated = draw_rated(model.model, tokenizer(), PROMPTS, early_letters, Drawing(n=3, max_new_tokens=5))
    assert rated.rewards.shape == (16, 3)
    texts = decode(tokenizer(), [e.response for e in rated.examples])
    assert rated.rewards.ravel().tolist() == early_letters([""] * 48, texts)
    made = contrast([rated, Rated(rated.examples, rated.rewards + 100.0)])
    assert sum(made.weights) == pytest.approx(0.0, abs=1e-9)
    per_prompt: dict[tuple[int, ...], float] = {}
    for example, weight in zip(made.examples, made.weights, strict=True):
        per_prompt[example.prompt] = per_prompt.get(example.prompt, 0.0) + weight
    assert max(map(abs, per_prompt.values())) < 1e-9
    with pytest.raises(ValueError, match="responses of different reward"):
        contrast([Rated(rated.examples, np.ones((16, 3)))])


def test_the_contrast_gradient_at_post_is_the_policy_gradient(tmp_path: Path) -> None:
    model, _ = resident(tmp_path)
    cut = thirds(model.pair.names)
    side = reward_side(model, cut)
    pool = side.draw(np.ones(3))
    made = contrast([pool], batch_size=16)
    tokens = sum(len(e.response) for e in made.examples)
    frozen = Likelihood(model, cut, made.backward).near(np.ones(3))(np.ones(3))[1] * tokens / len(pool.examples)
    np.testing.assert_allclose(frozen, side.near(np.ones(3))(np.ones(3))[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["contrast", "reward"])
def test_a_form_is_searched_once(tmp_path: Path, form: str) -> None:
    world = make(tmp_path)

    def search() -> BothSides:
        bench = Workbench(preflight(world / "pre", world / "post"), panel(world), Store(world / "work"))
        cut = thirds(bench.pair.names).with_rest_block()
        return FORMS[form](bench, cut, size=24, openings=("ab", "cd", "ef"))

    first = search()
    drawn, searched = first.path([0.5, 2.0]), first.exact([0.5, 2.0], max_passes=3)
    for f in (*drawn, *searched):
        assert len(f.ratios) == 4
        assert all(0 <= r <= 1 for r in f.ratios)
    if form == "contrast":  # the same loss everywhere: the descent cannot end above its start
        for f, truth in zip(searched, first.truth(drawn), strict=True):
            assert f.value <= truth["alignment"] + f.weight * truth["retention"]["pre"] + 1e-6
    else:
        assert first.measured["neighbours"]
        assert np.shape(first.measured["alignment"]["errors"]) == (5, 4)
    again = search()
    assert again.path([0.5, 2.0]) == drawn
    assert again.exact([0.5, 2.0], max_passes=3) == searched
    assert "resident" not in vars(again.bench)  # no model was loaded: all of it came from the store
