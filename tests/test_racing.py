"""A race drops what surely loses the reward, measures the rest as `restore` does, and says what each candidate cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterpoise.evaluation import panel as panels
from counterpoise.records import Store
from counterpoise.report.html import report_page
from counterpoise.restoration.race import LOOKS
from counterpoise.restoration.request import Details
from counterpoise.restoration.restore import restore
from counterpoise.search.candidates import HMA, Ramp
from counterpoise.statistics.demand import misses
from world import make, panel

ASKED: dict[str, Any] = {"searches": (Ramp(1.0), Ramp("reversed")), "means": (0.1, 0.5, 0.9), "keep_reward": 0.6}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def done(world: Path) -> dict[str, Any]:
    return restore(world / "pre", world / "post", world / "raced", panel(world), **ASKED, details=Details(race=True))


def test_only_what_keeps_the_demand_is_measured_whole(done: dict[str, Any]) -> None:
    cost = {row["name"]: row for row in done["race"]}
    assert set(cost) == {f"{method} {mean}" for method in ("MA", "LiNeS") for mean in (0.1, 0.5, 0.9)}  # no controls
    rows = [p for p in done["points"] if p["part"] == "validation"]
    assert [p["name"] for p in rows] == ["PRE", "POST", *(n for n, row in cost.items() if row["abilities"])]
    assert 0 < sum(row["abilities"] for row in cost.values()) < len(cost)
    pre, post = (p["reward"]["value"] for p in rows[:2])
    prompts = len(rows[0]["statistics"]["reward"]["reward"])
    for p in rows[2:]:
        assert p["reward"]["value"] - pre >= 0.6 * (post - pre)
        assert cost[p["name"]]["prompts"] == prompts
        assert cost[p["name"]]["kept"] == pytest.approx((p["reward"]["value"] - pre) / (post - pre))


def test_the_pick_is_that_of_a_restore_without_a_race(world: Path, done: dict[str, Any]) -> None:
    full = restore(world / "pre", world / "post", world / "whole", panel(world), **ASKED)
    assert done["pick"] == full["pick"]
    assert done["key"] != full["key"]
    assert done["shares"]["reward_kept"]["value"] == pytest.approx(full["shares"]["reward_kept"]["value"])
    assert "What each candidate of the race cost" in report_page(done)
    assert "What each candidate of the race cost" not in report_page(full)


def test_where_nobody_keeps_the_demand_the_two_nearest_are_measured(world: Path) -> None:
    asked = {**ASKED, "searches": (), "means": (0.05, 0.1, 0.15), "keep_reward": 1.0}
    result = restore(world / "pre", world / "post", world / "none", panel(world), **asked, details=Details(race=True))
    assert result["pick"] is None
    assert sum(row["abilities"] for row in result["race"]) == 2


def test_rewards_in_pieces_are_those_at_once(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(panels, "FEWEST", 2)
    model, words = (c.from_pretrained(world / "post") for c in (AutoModelForCausalLM, AutoTokenizer))
    once = panel(world)
    cut = replace(once, looks=LOOKS)
    whole = once.rewards(model, words, "validation")
    ends = cut.looks_at(len(whole))
    assert len(ends) > 2
    store = Store(world / "pieces")
    for looks, end in enumerate(ends, start=1):
        np.testing.assert_array_equal(cut.rewards(model, words, "validation", looks=looks, store=store), whole[:end])
    for kind in ("reward", "responses"):  # nothing is drawn twice
        assert len(list(store.folder.glob(f"{kind}-*"))) == len(ends)


def test_a_candidate_on_the_demand_is_dropped_as_often_as_the_level_says() -> None:
    random = np.random.default_rng(0)
    dropped = [misses(random.normal(0.9, 1, (30, 20)), np.ones(30), 0.9, 0.05).mean() for _ in range(200)]
    assert np.mean(dropped) == pytest.approx(0.05, abs=0.01)


def test_a_fixed_mean_leaves_nothing_to_race(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="race: expected a grid to pick from"):
        restore(
            world / "pre",
            world / "post",
            tmp_path / "out",
            panel(world),
            searches=[HMA()],
            details=Details(mean=0.5, race=True),
        )
