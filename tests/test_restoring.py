"""restore from end to end on a tiny pair that RSF really aligned."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import zscore

from counterpoise.averaging.mix import mix
from counterpoise.averaging.partition import equal
from counterpoise.averaging.recipe import Recipe
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.evaluation.measurement import Measurement, Scores
from counterpoise.evaluation.parts import part_of
from counterpoise.evaluation.results import measurement
from counterpoise.evaluation.workbench import Model, Point
from counterpoise.language.prompts import read_prompts
from counterpoise.records import public
from counterpoise.report.comparisons import read_comparisons
from counterpoise.report.matched import matched
from counterpoise.restoration.pick import choose, lowered, reached, shares, verdict
from counterpoise.restoration.request import Details, Request
from counterpoise.restoration.restore import measure_tax, restore
from counterpoise.search.candidates import HMA, Ramp, Search, TwoSided
from counterpoise.search.descent import SearchResult
from counterpoise.search.recipes import Wanted, find_recipe
from counterpoise.statistics.bootstrap import Array
from counterpoise.tables import reading
from world import early_letters, make, panel, searches

SETTINGS: dict[str, Any] = {"means": (0.3, 0.7), "keep_reward": 0.5, "details": Details(confidence=0.5), **searches()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def done(world: Path) -> tuple[Path, dict[str, Any]]:
    out = world / "restored"
    return out, restore(world / "pre", world / "post", out, panel(world), **SETTINGS)


@pytest.fixture
def out(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A new OUT, whose work folder holds all that `done` measured."""
    shutil.copytree(done[0].with_name("restored.work"), tmp_path / "out.work")
    return tmp_path / "out"


@pytest.mark.parametrize("command", ["restore", "search", "tax"])
@pytest.mark.parametrize(("name", "end"), [("model.safetensors", b"\0\0\0\0"), ("tokenizer_config.json", b"\n ")])
def test_an_input_that_changes_meanwhile_is_never_recorded(
    world: Path, tmp_path: Path, command: str, name: str, end: bytes
) -> None:
    for side in ("pre", "post"):
        shutil.copytree(world / side, tmp_path / side)
    pre, post, work, stages = tmp_path / "pre", tmp_path / "post", tmp_path / "work", set()

    def meddle(stage: str, done: int, total: int) -> None:
        if len(stages | {stage}) == 3 and len(stages) == 2:  # once both were read and hashed
            content = (post / name).read_bytes()
            (post / name).write_bytes(content[: -len(end)] + end if name.endswith("safetensors") else content + end)
        stages.add(stage)

    held = panel(world)
    commands = {
        "restore": lambda: restore(pre, post, tmp_path / "out", held, work=work, progress=meddle, **SETTINGS),
        "search": lambda: find_recipe(Wanted(pre, post, tmp_path / "out", HMA(3, 8), 0.5, work), held, progress=meddle),
        "tax": lambda: measure_tax(pre, post, held, work=work, progress=meddle),
    }
    with pytest.raises(CheckpointError, match=f"post/{name}: .* changed while it was read"):
        commands[command]()
    assert not (tmp_path / "out").exists()


def test_out_is_a_checkpoint_with_recipe_card_and_report(done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    expected = {"model.safetensors", "config.json", "tokenizer.json", "recipe.json", "restore.json", "report.html"}
    assert expected | {"README.md"} <= {f.name for f in out.iterdir()}
    assert json.loads((out / "restore.json").read_text()) == public(result.to_json())
    recipe = Recipe.read(out / "recipe.json")
    pre, post, made = (load_file(out.parent / n / "model.safetensors") for n in ("pre", "post", "restored"))
    ratios = recipe.partition.ratios(list(post), recipe.ratios)
    assert all(torch.equal(made[n], mix(pre[n], post[n], ratios[n])) for n in post)
    assert result["verdict"] in (out / "report.html").read_text()
    assert result["pick"] in (out / "README.md").read_text()


def test_points_front_and_pick_follow_from_the_validation_scores(done: tuple[Path, dict[str, Any]]) -> None:
    _, result = done
    rows = [p for p in result["points"] if p["part"] == "validation"]
    assert [r["method"] for r in rows[:2]] == ["PRE", "POST"]
    assert len(rows) == 2 + 7 * 2
    for mean in SETTINGS["means"]:
        assert all(r["mean"] == pytest.approx(mean) for r in rows[2:] if r["name"].endswith(f" {mean:g}"))
    needed = rows[0]["reward"]["value"] + 0.5 * (rows[1]["reward"]["value"] - rows[0]["reward"]["value"])
    able = [
        r for r in rows if r["method"] not in ("reversed", "random", "PRE", "POST") and r["reward"]["value"] >= needed
    ]
    assert result["pick"] in [r["name"] for r in able]
    assert ("It was not sure: no average keeps 50% to within" in result["verdict"]) == (not result["choice"]["sure"])
    for r in rows:
        beaten = any(
            o["reward"]["value"] >= r["reward"]["value"]
            and o["retention"]["value"] >= r["retention"]["value"]
            and o["name"] != r["name"]
            and (o["reward"]["value"], o["retention"]["value"]) != (r["reward"]["value"], r["retention"]["value"])
            for o in rows
        )
        assert r["on_front"] == (not beaten)
    assert {row["name"] for row in result["tax"]} == {"reward", "text", "guess"}


def test_every_item_is_kept_so_that_fronts_have_intervals(done: tuple[Path, dict[str, Any]]) -> None:
    out, _ = done
    content = json.loads((out / "restore.json").read_text())
    for p in content["points"]:
        for name, metric, score in [
            ("reward", "reward", p["reward"]),
            *((n, "-nll", p["abilities"][n]["-nll"]) for n in ["text"]),
        ]:
            found = measurement(content, p, name, metric)
            assert found is not None
            assert found.value == pytest.approx(score["value"], rel=1e-6)
    assert reading.floored(content) == set(content["floored"])
    (panel,) = read_comparisons([out / "restore.json"])
    rows = matched(panel)
    assert {r.part for r in rows} == {"validation", "held-out"} - (
        {"held-out"} if content["pick"].startswith("MA") else set()
    )
    gains = [g for r in rows for g in r.gains.values()]
    assert gains
    assert all(g.low <= g.value <= g.high for g in gains)


def test_a_second_run_says_it_is_finished_and_other_settings_are_refused(
    world: Path, done: tuple[Path, dict[str, Any]]
) -> None:
    out, result = done
    before = {f: f.stat().st_mtime_ns for f in out.iterdir()}
    again = restore(world / "pre", world / "post", out, panel(world), **SETTINGS)
    assert again["already_finished"]
    assert again["pick"] == result["pick"]
    assert before == {f: f.stat().st_mtime_ns for f in out.iterdir()}
    with pytest.raises(CheckpointError, match="other inputs or settings"):
        restore(world / "pre", world / "post", out, panel(world), **{**SETTINGS, "keep_reward": 0.6})


def test_the_primary_metric_decides_a_result_and_its_key_and_no_piece_is_measured_again(
    world: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, result = done
    held = panel(world)
    by_accuracy = [dataclasses.replace(a, primary="accuracy") if a.name == "guess" else a for a in held.abilities]  # type: ignore[type-var]
    other = dataclasses.replace(held, abilities=by_accuracy)
    with pytest.raises(CheckpointError, match="other inputs or settings"):
        restore(world / "pre", world / "post", out, other, **SETTINGS)
    work = tmp_path / "work"
    shutil.copytree(world / "restored.work", work)
    pieces = {f.name for f in work.glob("*.json")}
    again = restore(world / "pre", world / "post", tmp_path / "out", other, work=work, **SETTINGS)
    assert len(pieces) > 10
    assert {f.name for f in work.glob("*.json")} - {"restore.json"} == pieces - {"restore.json"}
    assert again["key"] != result["key"]
    assert [reading.primary(r)["guess"] for r in (result, again)] == ["logprob", "accuracy"]
    for name in ("text", "guess"):
        assert again["points"][3]["abilities"][name] == result["points"][3]["abilities"][name]


def test_what_fell_is_said_in_the_measure_that_counts() -> None:
    def row(name: str, metric: str, unit: str, tax: float, p: float) -> dict[str, Any]:
        return {"name": name, "metric": metric, "unit": unit, "at_floor": False, "tax": {"value": tax, "p": p}}

    arc = [row("arc", "logprob", "nats", 1.2, 0.001), row("arc", "accuracy", "%", 3.3, 0.4)]
    text = row("text", "-nll", "nats", 0.6, 0.001)
    assert lowered([*arc, text]) == "Alignment significantly lowered arc (logprob), text (nll); by accuracy none of 1"
    assert lowered([*arc[::-1], text]) == "Alignment significantly lowered text (nll); by likelihood 1 of 1"
    assert lowered([arc[1]]) == "No ability fell significantly"


def test_a_stopped_run_leaves_no_out_and_the_next_one_goes_on(
    world: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    scored: list[str] = []

    def counting(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        scored.extend(prompts)
        return early_letters(prompts, responses)

    def stop_at(stage: str) -> Any:
        def progress(name: str, done: int, total: int) -> None:
            if name.startswith(stage):
                raise KeyboardInterrupt

        return progress

    base = dataclasses.replace(panel(world), reward=counting)
    out = tmp_path / "out"
    for stage in ("searching ratios, mean 0.7", "HMA 0.3, validation", "writing the checkpoint"):
        with pytest.raises(KeyboardInterrupt):
            restore(world / "pre", world / "post", out, base, **SETTINGS, progress=stop_at(stage))
        assert not out.exists()
    result = restore(world / "pre", world / "post", out, base, **SETTINGS)
    assert result["points"] == done[1]["points"]  # as if never stopped
    assert result["search"] == done[1]["search"]
    measured = len(result["points"]) * 30 + 2 * 15  # each point's prompts once, and two responses to 15 proxy prompts
    assert len(scored) == measured


def test_search_and_pick_never_see_the_held_out_prompts(world: Path, tmp_path: Path) -> None:
    asked: list[set[str]] = []

    def listening(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        asked.append({part_of(by_text[p]) for p in prompts})
        return early_letters(prompts, responses)

    by_text = {p.text: p.key for p in read_prompts(world / "prompts.jsonl")}
    restore(
        world / "pre", world / "post", tmp_path / "out", dataclasses.replace(panel(world), reward=listening), **SETTINGS
    )
    assert all(len(parts) == 1 for parts in asked)
    order = [next(iter(parts)) for parts in asked]
    assert set(order) == {"proxy", "validation", "held-out"}
    assert "held-out" not in order[: order.index("held-out")]
    assert set(order[order.index("held-out") :]) == {"held-out"}


def test_without_a_gain_nothing_is_searched_or_written(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = restore(world / "post", world / "pre", out, panel(world), **SETTINGS)
    assert "not significantly above" in result["verdict"]
    assert result["out"] is None
    assert result["search"] == []
    assert not out.exists()
    assert (tmp_path / "out.work" / "report.html").is_file()


def test_when_too_much_is_asked_the_next_best_is_named(world: Path, out: Path) -> None:
    result = restore(world / "pre", world / "post", out, panel(world), **{**SETTINGS, "keep_reward": 0.99})
    assert result["out"] is None
    assert "no point beats both ends" in result["verdict"]
    name, kept = re.search(r"(\S+ 0\.\d+) comes closest: --keep-reward (0\.\d+) would", result["verdict"]).groups()  # type: ignore[union-attr]
    again = restore(world / "pre", world / "post", out, panel(world), **{**SETTINGS, "keep_reward": float(kept)})
    at = {p["name"]: p["retention"]["value"] for p in again["points"] if p["part"] == "validation"}
    assert at[again["pick"]] >= at[name]  # it is accepted, and left only for one that keeps more


def test_a_fixed_mean_writes_hma_there(world: Path, tmp_path: Path) -> None:
    result = restore(
        world / "pre",
        world / "post",
        tmp_path / "out",
        panel(world),
        details=Details(mean=0.5),
        searches=[HMA("layerwise", 12)],
    )
    recipe = Recipe.read(tmp_path / "out" / "recipe.json")
    assert result["pick"] == "HMA 0.5"
    assert len(recipe.ratios) == 6
    assert recipe.mean == pytest.approx(0.5)


def test_choose_wants_more_reward_than_pre_and_less_tax_than_post() -> None:
    def point(method: str, reward: float, ability: float) -> Point:
        def measured(value: float) -> Measurement:
            noise = np.linspace(-1, 1, 20)[:, None]
            return Measurement("m", "", value + noise, "mean", None, tuple(map(str, range(20))))

        scores = Scores(measured(reward), {"a": [measured(ability)]})
        return Point(Model(method, method, equal(["layers.0.w"], 1), (0.5,)), "validation", scores)

    ends = point("PRE", 0.0, 10.0), point("POST", 1.0, 5.0)
    good, better = point("MA", 0.96, 6.0), point("HMA", 0.97, 7.0)
    assert choose(*ends, [good, better], ["a"], 0.95, 0.9)[0] is better
    assert choose(*ends, [point("MA", 0.5, 9.0)], ["a"], 0.95, 0.9)[0] is None  # too little reward
    assert choose(*ends, [point("MA", 1.2, 4.0)], ["a"], 0.95, 0.9)[0] is None  # more tax than POST
    assert choose(*ends, [good], [], 0.95, 0.9)[0] is None  # no ability above floor


def test_the_demand_decides_as_far_as_the_sample_can_tell(world: Path, out: Path) -> None:
    """At no confidence it is the most retention of all that keep the share here; the key of the result knows it."""
    asked = {**SETTINGS, "details": Details(confidence=0.0)}
    result = restore(world / "pre", world / "post", out, panel(world), **asked)
    rows = [p for p in result["points"] if p["part"] == "validation"]
    pre, post = (r["reward"]["value"] for r in rows[:2])
    picked = [r for r in rows[2:] if r["method"] not in ("reversed", "random")]
    able = [r for r in picked if r["reward"]["value"] >= (pre + post) / 2]
    assert result["pick"] == max(able, key=lambda r: r["retention"]["value"])["name"]
    assert result["choice"]["sure"]
    with pytest.raises(CheckpointError, match="other inputs or settings"):
        restore(world / "pre", world / "post", out, panel(world), **SETTINGS)


def test_tax_and_search_stand_alone(world: Path, tmp_path: Path) -> None:
    found = measure_tax(world / "pre", world / "post", panel(world))
    rows = found["tax"]
    assert found["warnings"] == []
    reward = next(r for r in rows if r["name"] == "reward")
    assert reward["tax"]["value"] < 0
    assert reward["tax"]["p"] < 0.05
    assert all(r["tax"]["value"] == pytest.approx(r["pre"]["value"] - r["post"]["value"]) for r in rows)
    out = tmp_path / "recipe.json"
    wanted = Wanted(world / "pre", world / "post", out, HMA(proxy_size=12), 0.5, tmp_path / "work")
    found, recipe = find_recipe(wanted, panel(world))
    assert isinstance(found, SearchResult)
    assert found.value <= found.trace[0]
    assert Recipe.read(tmp_path / "recipe.json").ratios == recipe.ratios == found.ratios
    written = (tmp_path / "recipe.json").read_bytes()
    again, _ = find_recipe(wanted, panel(world))
    assert again.ratios == found.ratios
    assert (tmp_path / "recipe.json").read_bytes() == written
    with pytest.raises(CheckpointError, match="found another's"):
        find_recipe(dataclasses.replace(wanted, at=0.6), panel(world))
    assert (tmp_path / "recipe.json").read_bytes() == written


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"means": ()}, "means: expected"),
        ({"means": (0.3, float("nan"))}, "means: expected"),
        ({"details": Details(mean=1.2)}, "mean: expected a number from 0 to 1"),
        ({"keep_reward": 95}, "keep_reward: expected a number from 0 to 1"),
        ({"details": Details(confidence=1)}, "confidence: expected a number from 0 to below 1"),
        ({"searches": [HMA(proxy_size=0)]}, "proxy_size: expected at least 1"),
        ({"searches": [HMA(blocks=40)]}, "blocks: expected between 1 and 6"),
        ({"searches": [HMA(), HMA(blocks=2)]}, "searches: expected one hma, found more"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(
    world: Path, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        restore(world / "pre", world / "post", tmp_path / "out", panel(world), **{**SETTINGS, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_what_is_searched_decides_the_settings_of_a_result(tmp_path: Path) -> None:
    def request(*found: Search, **more: Any) -> Request:
        return Request("pre", "post", tmp_path, found, **more)

    assert request(TwoSided(), cut=7).blocks == 7
    assert request(HMA(blocks=4), cut=7).blocks == request(Ramp("linear", blocks=4), cut=7).blocks == 4
    alike, other = (request(HMA(), Ramp("linear", blocks=b)) for b in (3, 5))
    assert alike.settings == other.settings
    assert alike.more_settings != other.more_settings


def test_the_grid_may_extrapolate_with_ma_alone(world: Path, out: Path) -> None:
    settings = {**SETTINGS, "means": (0.7, 1.2), **searches(controls=False)}
    result = restore(world / "pre", world / "post", out, panel(world), **settings)
    names = [p["name"] for p in result["points"] if p["part"] == "validation"]
    assert names == ["PRE", "POST", "MA 0.7", "HMA 0.7", "MA 1.2"]


def test_when_every_ability_is_at_floor_it_says_so(world: Path, tmp_path: Path) -> None:
    measured = panel(world)
    guessing = dataclasses.replace(measured, abilities=[a for a in measured.abilities if a.name == "guess"])
    result = restore(world / "pre", world / "post", tmp_path / "out", guessing, **SETTINGS)
    assert "Every ability is at floor" in result["verdict"]
    assert result["out"] is None
    fixed = restore(
        world / "pre", world / "post", tmp_path / "fixed", guessing, **{**SETTINGS, "details": Details(mean=0.6)}
    )
    assert "no ability above floor" in fixed["verdict"]
    assert (tmp_path / "fixed" / "report.html").is_file()


def test_a_run_that_wrote_no_checkpoint_is_finished_too(world: Path, tmp_path: Path) -> None:
    for finished in (False, True):
        result = restore(world / "post", world / "pre", tmp_path / "out", panel(world), **SETTINGS)
        assert result.get("already_finished", False) == finished
        assert result["out"] is None


def test_the_report_stands_before_the_mark_that_a_run_is_finished(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(results: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("counterpoise.report.html.report_page", stop)
        with pytest.raises(KeyboardInterrupt):
            restore(world / "post", world / "pre", tmp_path / "out", panel(world), **SETTINGS)
    result = restore(world / "post", world / "pre", tmp_path / "out", panel(world), **SETTINGS)
    assert "already_finished" not in result
    assert (tmp_path / "out.work" / "report.html").is_file()


def test_work_of_other_numerics_is_not_mixed_in(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pieces in (12, 12, 24):  # responses, reward, two abilities of PRE and of POST; three distances, PRE's own text
        if pieces == 24:
            monkeypatch.setattr("counterpoise.evaluation.workbench.NUMERICS", 0)
        measure_tax(world / "pre", world / "post", panel(world), work=tmp_path)
        assert len(list(tmp_path.iterdir())) == pieces


def test_another_tokenizer_is_another_run(world: Path, tmp_path: Path) -> None:
    """Stored work is keyed by all that decides it: the donor's template changes what a model is asked."""
    shutil.copytree(world / "post", tmp_path / "post")
    asked = {"details": Details(mean=0.5), **searches(controls=False), "work": tmp_path / "work"}
    restore(world / "pre", tmp_path / "post", tmp_path / "a", panel(world), **asked)
    stored = len(list((tmp_path / "work").glob("reward-*")))
    settings = json.loads((tmp_path / "post" / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}?{% endfor %}"
    (tmp_path / "post" / "tokenizer_config.json").write_text(json.dumps(settings))
    restore(world / "pre", tmp_path / "post", tmp_path / "b", panel(world), **asked)
    assert len(list((tmp_path / "work").glob("reward-*"))) >= 2 * stored


def scored(reward: Array, *abilities: Array) -> Scores:
    def measured(name: str, values: Array) -> Measurement:
        return Measurement(name, "", values[:, None], "mean", None, tuple(map(str, range(len(values)))))

    return Scores(measured("reward", reward), {f"a{n}": [measured("x", v)] for n, v in enumerate(abilities)})


def test_the_verdict_says_what_was_asked_what_came_and_how_sure_that_is() -> None:
    noise = np.random.default_rng(0).normal(size=(3, 200))
    base, item, jitter = noise
    pre, post = scored(base, item, item), scored(base + 2 + jitter, item - 1 + 0.3 * jitter, item - 3)
    pick = scored(base + 1.8 + jitter, item - 0.5, item - 1)
    found = shares(pre, post, pick, ["a0", "a1"])
    kept, back = found["reward_kept"], found["tax_given_back"]
    assert kept["low"] < 0.9 < kept["high"] < 1
    assert back["low"] < 1 - (0.5 + 1 / 3) / 2 < back["high"] < 1
    said = reached({"asked": 0.95, **found}, "MA 0.8")
    share = r"\d\d% \[\d\d, \d\d\]"
    assert re.match(
        rf"The demand was missed: asked for 95%, got {share} of the reward gain. MA 0\.8 keeps that and gives back",
        said,
    )
    assert re.search(rf"{share} of the mean tax of 2 abilities; 2 of them still below PRE, a0 the most", said)
    assert reached({"asked": 0.8, **found}, "MA 0.8").startswith("MA 0.8 keeps")
    rounded = {"asked": 0.9, **found, "reward_kept": {**kept, "value": 0.897}}
    assert reached(rounded, "MA 0.8").startswith("MA 0.8 keeps 90%")  # no miss that the numbers do not show


@pytest.mark.filterwarnings("error")
def test_a_tax_of_few_items_has_a_share_given_back_though_a_resample_has_lost_nothing() -> None:
    flat, lost = np.zeros(6), -np.repeat([1.0, 0.0], [4, 2])
    found = shares(scored(flat, flat), scored(flat + 1, lost), scored(flat + 1, lost / 2), ["a0"])["tax_given_back"]
    assert found == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_where_no_pick_is_sure_enough_the_verdict_says_how_many_prompts_would_do() -> None:
    base, item, jitter, own = zscore(np.random.default_rng(2).normal(size=(4, 40)), axis=1)

    def point(name: str, ratio: float, noise: Array) -> Point:
        scores = scored(base + 2 * ratio + noise, item - ratio)
        return Point(Model(name, name, equal(["layers.0.w"], 1), (ratio,)), "validation", scores)

    ends = point("PRE", 0.0, 0 * base), point("POST", 1.0, jitter)
    able = [point("MA", 0.9, jitter + 3.2 * own)]
    pick, choice = choose(*ends, able, ["a0"], 0.8, 0.9)
    assert pick is None
    assert choice["would_do"] > choice["prompts"] == 40
    said = verdict({"tax": [], "choice": choice}, pick, 0.8, {"MA"})
    assert (
        "No pick is sure enough, so no checkpoint was written: no average keeps 80% to within 5 points at 90%" in said
    )
    assert f"about {choice['would_do']} would do" in said
    assert choose(*ends, able, ["a0"], 0.8, 0.0)[0] is able[0]


def test_no_share_is_said_of_a_gain_or_a_tax_that_held_out_data_does_not_confirm() -> None:
    base, item, jitter = np.random.default_rng(1).normal(size=(3, 40))
    pre, post = scored(base, item), scored(base + 0.06 + jitter, item - 0.05 + jitter)
    found = shares(pre, post, post, ["a0"])
    assert found["reward_kept"] is None
    assert found["tax_given_back"] is None
    said = reached({"asked": 0.95, **found}, "MA 0.4")
    assert "POST's gain in reward was not confirmed on held-out data (" in said
    assert "POST's mean tax is not clear of 0" in said
    assert "%" not in said
    assert "no ability above floor" in reached({"asked": None, **shares(pre, post, post, [])}, "MA 0.4")
