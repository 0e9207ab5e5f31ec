"""Panels, paired differences and tax tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterpoise.evaluation.abilities import load_abilities
from counterpoise.evaluation.measurement import (
    Measurement,
    Scores,
    at_floor,
    difference,
    interval_of,
    retention,
    retentions,
    tax_table,
    unit_of,
    units,
)
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.parts import PARTS, Part, part_of
from counterpoise.evaluation.rewards import fingerprint
from counterpoise.language.prompts import encode_prompt
from counterpoise.language.sampling import Drawing, decode, sample
from counterpoise.records import Store
from tiny import nudge, tiny, tokenizer

ITEMS = 200
KEYS = tuple(f"k{n}" for n in range(ITEMS))


def vowels(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [sum(c in "aeiou" for c in r) - len(p) for p, r in zip(prompts, responses, strict=True)]


def accuracy(right: float, *, chance: float | None = 50.0, items: int = ITEMS, name: str = "accuracy") -> Measurement:
    """That share of the items right, the first ones."""
    hits = 100.0 * (np.arange(items) < round(right * items))
    return Measurement(name, "%", hits[:, None], "mean", chance, KEYS[:items])


def nll(per_token: float) -> Measurement:
    tokens = np.random.default_rng(0).integers(1, 9, size=ITEMS).astype(float)
    noise = np.random.default_rng(1).normal(size=ITEMS)
    return Measurement(
        "-nll", "nats/token", np.stack([-per_token * tokens + 0.1 * noise, tokens], 1), "ratio", None, KEYS
    )


# Tables


def test_a_difference_is_paired_and_has_the_sign_of_its_name() -> None:
    found = difference(accuracy(0.8), accuracy(0.7))
    assert found["value"] == pytest.approx(10)
    error = 100 * (0.1 * 0.9 / ITEMS) ** 0.5  # one item in ten differs; unpaired it would be twice as wide
    assert found["low"] == pytest.approx(10 - 1.96 * error, abs=0.5 * error)
    assert found["high"] == pytest.approx(10 + 1.96 * error, abs=0.5 * error)
    assert found["p"] < 0.01
    assert difference(accuracy(0.7), accuracy(0.8))["value"] == pytest.approx(-10)


def test_other_items_are_refused() -> None:
    other = Measurement("accuracy", "%", accuracy(0.7).statistics, "mean", 50.0, (*KEYS[1:], KEYS[0]))
    with pytest.raises(ValueError, match="accuracy: expected two measurements of the same items, found 200 and 200"):
        difference(accuracy(0.8), other)
    with pytest.raises(ValueError, match="found 200 and 100"):
        difference(accuracy(0.8), accuracy(0.8, items=100))
    with pytest.raises(ValueError, match="the same items"):
        tax_table(Scores(nll(1), {"a": [accuracy(0.8)]}), Scores(nll(1), {"a": [other]}))


@pytest.mark.parametrize(("measurements", "floor"), [
    ([accuracy(0.8)], False),
    ([accuracy(0.5)], True),
    ([accuracy(0.3)], True),
    ([accuracy(0.55)], True),  # above chance, but 1.96 standard errors are 7 points
    ([accuracy(0.58)], False),
    ([accuracy(0.58, items=100)], True),
    ([nll(3.0)], False),  # no chance level
    ([nll(3.0), accuracy(0.5)], True),
    ([accuracy(0.3, chance=None)], False),
    ([accuracy(0.0, chance=0.0)], True),  # exact match, never
    ([accuracy(0.04, chance=0.0)], False),
])  # fmt: skip
def test_at_floor_when_the_interval_does_not_clear_chance(measurements: list[Measurement], floor: bool) -> None:
    assert at_floor(measurements) == floor


def test_the_table_has_the_signs_of_a_loss() -> None:
    def scores(reward: float, loss: float, right: float) -> Scores:
        return Scores(nll(-reward), {"trivia": [nll(loss), accuracy(right)], "luck": [accuracy(0.5, name="luck")]})

    pre, post, pick = scores(1, 2.0, 0.9), scores(3, 2.5, 0.6), scores(2.5, 2.1, 0.85)
    rows = {(r["name"], r["metric"]): r for r in tax_table(pre, post, pick)}
    assert list(rows) == [("reward", "-nll"), ("trivia", "-nll"), ("trivia", "accuracy"), ("luck", "luck")]
    tax = {key: (r["tax"]["value"], r["remaining"]["value"]) for key, r in rows.items()}
    assert tax["reward", "-nll"] == pytest.approx((-2, -1.5))  # gained
    assert tax["trivia", "-nll"] == pytest.approx((0.5, 0.1))  # half a nat a token is lost, a tenth remains lost
    assert tax["trivia", "accuracy"] == pytest.approx((30, 5))
    assert tax["luck", "luck"] == (0, 0)
    row = rows["trivia", "accuracy"]
    assert [row[k]["value"] for k in ("pre", "post", "pick")] == pytest.approx([90, 60, 85])
    assert row["pre"] == interval_of(accuracy(0.9))
    assert row["pre"]["low"] < 90 < row["pre"]["high"]
    assert row["tax"] == difference(accuracy(0.9), accuracy(0.6))
    assert (row["unit"], row["items"]) == ("%", ITEMS)
    assert [r["at_floor"] for r in rows.values()] == [False, False, False, True]
    without = tax_table(pre, post)
    assert [(r["pick"], r["remaining"]) for r in without] == [(None, None)] * 4
    assert [r["tax"] for r in without] == [r["tax"] for r in rows.values()]


def noisy(shift: float, *, items: int = ITEMS, spread: float = 1.0, seed: int = 0) -> Measurement:
    """Scores whose mean is about `shift`; the same seed is the same items."""
    drawn = np.random.default_rng(seed).normal(size=items) + 0.3 * np.random.default_rng([seed, 9]).normal(size=items)
    return Measurement("logprob", "nats", (spread * (drawn + shift))[:, None], "mean", None, KEYS[:items])


def scores(**shifts: float) -> Scores:
    return Scores(noisy(0), {name: [noisy(shift, seed=n)] for n, (name, shift) in enumerate(shifts.items())})


def test_pre_is_zero_and_post_one_loss_below_whatever_an_ability_is_measured_in() -> None:
    pre, post = scores(a=0, b=0, c=0), scores(a=-1, b=-20, c=-0.4)
    post.abilities["b"] = [noisy(-1, spread=20, seed=1)]
    pre.abilities["b"] = [noisy(0, spread=20, seed=1)]
    unit = units(pre, post, ["a", "b", "c"])
    assert retention(pre, pre, unit)["value"] == 0
    found = retention(pre, post, unit)
    assert found["value"] == pytest.approx(-1)
    assert (found["below"], found["of"]) == (3, 3)
    half = retention(pre, Scores(pre.reward, {**post.abilities, "a": pre.abilities["a"]}), unit)
    assert half["value"] == pytest.approx(-2 / 3)
    assert (half["below"], half["worst"]["name"]) == (2, "b")


def test_a_gain_does_not_hide_a_loss_and_noise_counts_for_little() -> None:
    pre, post = scores(lost=0, won=0), scores(lost=-1, won=1)
    unit = units(pre, post, ["lost", "won"])
    found = retention(pre, post, unit)
    assert found["value"] == pytest.approx(0)
    assert (found["below"], found["worst"]["name"]) == (1, "lost")
    assert found["worst"]["value"] == pytest.approx(-1)
    assert found["worst"]["high"] < 0
    jitter = 0.1 * np.random.default_rng(8).normal(size=(ITEMS, 1))
    still = dataclasses.replace(noisy(0), statistics=noisy(0).statistics + jitter)
    moved = Scores(noisy(0), {"still": [still]})
    before = Scores(noisy(0), {"still": [noisy(0)]})
    assert abs(retention(before, moved, units(before, moved, ["still"]))["value"]) < 1


def test_the_unit_of_a_loss_does_not_shrink_with_the_number_of_items() -> None:
    few, many = (unit_of(noisy(0, items=n), noisy(-1, items=n)) for n in (50, ITEMS))
    assert few == pytest.approx(1)
    assert many == pytest.approx(1)


def test_a_measurement_survives_json_bit_for_bit() -> None:
    before = nll(1 / 3)
    after = Measurement.from_json(json.loads(json.dumps(before.to_json())))
    assert np.array_equal(after.statistics, before.statistics)
    assert after.statistics.dtype == np.float64
    assert (after.metric, after.unit, after.aggregate, after.chance, after.keys) == (
        "-nll",
        "nats/token",
        "ratio",
        None,
        KEYS,
    )
    assert accuracy(0.75).value == 75


# Panels


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, str]:
    prompts, items = tmp_path / "prompts.jsonl", tmp_path / "items.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {n} now"}) + "\n" for n in range(40)))
    items.write_text("".join(json.dumps({"context": f"c{n}", "continuation": f"d{n % 3}"}) + "\n" for n in range(40)))
    return prompts, f"continue:{items}"


def panel(files: tuple[Path, str], prompt_limit: int | None = None, **drawn: int) -> Panel:
    drawing = Drawing(max_new_tokens=6, batch_size=2, **drawn)
    return Panel.load(files[0], vowels, [files[1]], drawing=drawing, prompt_limit=prompt_limit)


def test_a_panel_measures_the_reward_of_sampled_responses_and_every_ability(files: tuple[Path, str]) -> None:
    model, words, mine = tiny("llama"), tokenizer(), panel(files, seed=1)
    done: list[tuple[int, int]] = []
    found = mine.measure(model, words, "validation", progress=lambda *at: done.append(at))
    prompts = mine.prompts_of("validation")
    drawn = sample(
        model, words, [encode_prompt(words, p) for p in prompts], Drawing(max_new_tokens=6, batch_size=8, seed=1)
    )
    wanted = vowels([p.text for p in prompts], decode(words, [group[0] for group in drawn]))
    assert found.reward.statistics[:, 0].tolist() == wanted
    assert len(set(wanted)) > 2
    assert found.reward.keys == tuple(p.key for p in prompts)
    (alone,) = load_abilities([files[1]])[0].measure(model, words, "validation", Drawing(batch_size=2))
    assert np.array_equal(found.abilities["items"][0].statistics, alone.statistics)
    assert done == [(1, 2), (2, 2)]
    assert found.summary()["reward"] == interval_of(found.reward)
    assert found.summary()["abilities"]["items"]["-nll"]["value"] == alone.value


def test_the_reward_of_a_prompt_is_the_mean_over_its_replies(files: tuple[Path, str]) -> None:
    model, words, mine = tiny("llama"), tokenizer(), panel(files, seed=3, n=3)
    found = mine.measure(model, words, "validation").reward
    prompts = mine.prompts_of("validation")
    encoded = [encode_prompt(words, p) for p in prompts]
    drawn = sample(model, words, encoded, Drawing(n=3, max_new_tokens=6, batch_size=8, seed=3))
    wanted = [np.mean(vowels([p.text] * 3, decode(words, group))) for p, group in zip(prompts, drawn, strict=True)]
    assert found.statistics[:, 0].tolist() == pytest.approx(wanted)
    assert found.keys == tuple(p.key for p in prompts)
    once = panel(files, seed=3).measure(model, words, "validation").reward
    assert np.var(found.statistics) < np.var(once.statistics)


def test_prompts_are_split_by_content_and_only_measured_parts_are_limited(files: tuple[Path, str]) -> None:
    whole, cut = panel(files), panel(files, prompt_limit=3)
    keys = {part: [p.key for p in whole.prompts_of(part)] for part in PARTS}
    assert sorted(k for ks in keys.values() for k in ks) == sorted(p.key for p in whole.prompts)
    assert all(part_of(k) == part for part, ks in keys.items() for k in ks)
    assert [p.key for p in cut.prompts_of("proxy")] == keys["proxy"]
    assert [p.key for p in cut.prompts_of("held-out")] == keys["held-out"][:3]
    few = Panel(whole.prompts_of("proxy"), vowels, [])
    with pytest.raises(ValueError, match=r"expected some in the held-out part, found none among \d+; give at least"):
        few.prompts_of("held-out")


def test_finished_pieces_are_read_back_and_others_computed(files: tuple[Path, str], tmp_path: Path) -> None:
    asked: list[int] = []

    def counting(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        asked.append(len(responses))
        return vowels(prompts, responses)

    store = Store(tmp_path / "work")

    def measure(model: torch.nn.Module, model_id: str, part: Part, limit: int | None = None, **drawn: Any) -> Scores:
        drawing = Drawing(max_new_tokens=4, batch_size=16, **drawn)
        mine = Panel.load(files[0], counting, [files[1]], drawing=drawing, prompt_limit=limit)
        return mine.measure(model, tokenizer(), part, store=store, model_id=model_id)

    def stored() -> int:  # beside the responses, which every reward of them may read
        return sum(not f.name.startswith("responses-") for f in (tmp_path / "work").glob("*.json"))

    pre, post = tiny("llama"), nudge(tiny("llama"), scale=0.5)
    first = measure(pre, "pre", "proxy")
    again = measure(pre, "pre", "proxy")
    assert (len(asked), stored()) == (1, 2)
    assert np.array_equal(first.reward.statistics, again.reward.statistics)
    assert np.array_equal(first.abilities["items"][0].statistics, again.abilities["items"][0].statistics)
    assert first.summary() == again.summary()
    other = measure(post, "post", "proxy")
    assert (len(asked), stored()) == (2, 4)
    assert other.reward.value != first.reward.value
    assert other.abilities["items"][0].value != first.abilities["items"][0].value
    measure(pre, "pre", "held-out")
    assert (len(asked), stored()) == (3, 6)
    for settings in ({"seed": 1}, {"temperature": 0.5}, {"chat": False}, {"limit": 2}, {"n": 2}):
        before = len(asked)
        measure(pre, "pre", "held-out", **settings)
        assert len(asked) == before + 1, settings
    assert tax_table(first, other)[0]["tax"]["value"] == pytest.approx(first.reward.value - other.reward.value)


def test_another_primary_metric_measures_nothing_again_and_stands_first(
    files: tuple[Path, str], tmp_path: Path
) -> None:
    path, store = tmp_path / "guess.jsonl", Store(tmp_path / "work")
    rows = [{"query": f"q{n}", "choices": ["a", "b"], "gold": n % 2} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for query in ("", "?primary=accuracy", "?primary=logprob"):
        mine = Panel.load(files[0], vowels, [f"choices:{path}{query}"], drawing=Drawing(max_new_tokens=4))
        scores = mine.measure(tiny("llama"), tokenizer(), "proxy", store=store, model_id="pre")
        found[query] = {m.metric: m.statistics.tolist() for m in scores.abilities["guess"]}
        assert mine.primary == ({"guess": "accuracy"} if "accuracy" in query else {})
    assert len(list((tmp_path / "work").glob("*.json"))) == 3  # the responses, their reward and the ability
    assert found[""] == found["?primary=accuracy"] == found["?primary=logprob"]
    first = [next(iter(of)) for of in found.values()]
    assert first == ["logprob", "accuracy", "logprob"]
    assert found[""]["accuracy"] != found[""]["logprob"]


def test_retention_by_either_kind_is_over_what_is_measured_both_ways() -> None:
    noise = np.linspace(-1, 1, 40)[:, None]

    def measured(metric: str, unit: str, value: float) -> Measurement:
        return Measurement(metric, unit, value + noise, "mean", None, tuple(map(str, range(40))))

    def model(likely: float, right: float, told: float, *, turned: bool = False) -> Scores:
        both = [measured("logprob", "nats/token", likely), measured("accuracy", "%", right)]
        return Scores(
            measured("reward", "", 0.0),
            {"guess": both[::-1] if turned else both, "text": [measured("-nll", "nats/token", told)]},
        )

    for turned in (False, True):
        pre, post, half = (model(*v, turned=turned) for v in ((-1, 60, -2), (-3, 60, -4), (-2, 60, -4)))
        (found,) = retentions(pre, post, [half], ["guess", "text"])
        assert found["retention_by"]["likelihood"]["value"] == pytest.approx(-0.5)  # the text has no accuracy
        assert found["retention_by"]["accuracy"]["value"] == 0
        assert found["retention"]["value"] == pytest.approx(
            (-1 - (0 if turned else 0.5)) / 2
        )  # the first metric counts
    (alone,) = retentions(pre, post, [half], ["text"])
    assert alone["retention_by"] == {}


def test_a_reward_that_fails_leaves_the_responses_alone(files: tuple[Path, str], tmp_path: Path) -> None:
    def broken(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float("nan")] * len(responses)

    with pytest.raises(ValueError, match=r"reward .*broken: expected finite numbers"):
        Panel.load(files[0], broken, [files[1]], drawing=Drawing(max_new_tokens=2, batch_size=16)).measure(
            tiny("llama"), tokenizer(), "proxy", store=Store(tmp_path / "work"), model_id="pre"
        )
    assert [f.name.partition("-")[0] for f in (tmp_path / "work").iterdir()] == ["responses"]  # not drawn again


def test_a_fingerprint_follows_the_content_of_a_file_and_of_a_function(tmp_path: Path) -> None:
    for name, text in (("a.csv", "text,label"), ("b.csv", "text,label"), ("c.csv", "label,text")):
        (tmp_path / name).write_text(text)
    a, b, c = (fingerprint(f"sentiment:{tmp_path / name}.csv") for name in "abc")
    assert a == b != c
    assert fingerprint(vowels) == fingerprint(vowels) != fingerprint(lambda prompts, responses: [])
    assert fingerprint("org/reward@v1") == "org/reward@v1"
