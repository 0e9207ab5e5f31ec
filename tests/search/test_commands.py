"""The two-sided search from the command line: restore, a recipe, a checkpoint; and the page it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from counterpoise.averaging.average import average
from counterpoise.averaging.mix import mix
from counterpoise.averaging.recipe import Recipe
from counterpoise.checkpoints.preflight import preflight
from counterpoise.cli.app import app
from counterpoise.records import Store
from counterpoise.report.plots import plot_two_sided
from counterpoise.restoration.request import Details
from counterpoise.restoration.restore import restore
from counterpoise.search.candidates import Ramp, TwoSided
from counterpoise.tables import reading, tables
from world import make, panel, searches

SETTINGS: dict[str, Any] = {"means": (0.5,), "keep_reward": 0.3}
LAMBDAS = (0.5, 2.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def done(world: Path) -> tuple[Path, dict[str, Any]]:
    out = world / "restored"
    return out, restore(
        world / "pre", world / "post", out, panel(world), **searches(hma=False, size=16, lambdas=LAMBDAS), **SETTINGS
    )


def test_restore_compares_both_searches_with_ma(done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    rows = [p for p in result["points"] if p["part"] == "validation"]
    assert "HMA" not in {r["method"] for r in rows}
    names = [r["name"] for r in rows if r["method"].startswith("two-sided")]
    assert names == [f"two-sided {how} {x}" for how in ("path", "exact") for x in ("0.5", "2")]
    found = result["two_sided"]
    assert found["passes"] == 10
    assert [b["name"] for b in found["partition"]["blocks"]][-1] == "outside the layers"
    assert all(len(r["ratios"]) == 7 for r in found["rows"])
    assert json.loads((out / "restore.json").read_text())["two_sided"] == json.loads(json.dumps(found))
    recipe = Recipe.read(out / "recipe.json")
    pre, post, made = (load_file(out.parent / n / "model.safetensors") for n in ("pre", "post", "restored"))
    of = recipe.partition.ratios(list(post), recipe.ratios)
    assert all(torch.equal(made[n], mix(pre[n], post[n], of[n])) for n in post)


def test_the_page_shows_lambda_both_sides_and_ratios(done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    page = (out / "report.html").read_text()
    assert "The two-sided search" in page
    made = tables.two_sided_table(result)
    assert [c.title for c in made.columns][:4] == ["search", "lambda", "alignment lost", "of what PRE says"]
    assert len(made.rows) == 4
    drawn = plot_two_sided(result, "exact")
    assert [t.name for t in drawn.data] == ["lambda 0.50", "lambda 2.00"]
    assert list(drawn.data[0].x) == list(range(6))
    point = next(p for p in reading.measured_points(result) if p["name"] == "two-sided exact 2")
    assert [s.block for s in reading.point_shares(result, point)][-1] == "outside the layers"


def test_beside_hma_the_defaults_do_not_move(world: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    both, plain = (
        restore(
            world / "pre", world / "post", tmp_path / name, panel(world), work=world / "restored.work", **searched, **SETTINGS
        )
        for name, searched in (("both", searches(size=16, lambdas=LAMBDAS)), ("hma", searches(size=16)))
    )  # fmt: skip
    assert "two_sided" not in plain
    assert "search" not in plain["settings"]
    shared = [p for p in both["points"] if p["part"] == "validation" and not p["method"].startswith("two-sided")]
    for one, other in zip(shared, [p for p in plain["points"] if p["part"] == "validation"], strict=True):
        assert {**one, "on_front": None} == {**other, "on_front": None}
    assert both["two_sided"]["rows"] == done[1]["two_sided"]["rows"]


def test_the_worst_set_is_guarded_when_asked(world: Path, tmp_path: Path) -> None:
    searched = searches(hma=False, controls=False, size=16, lambdas=(1.0,), calibrate=6, min_effective_sets=1.5)
    result = restore(
        world / "pre", world / "post", tmp_path / "out", panel(world),
        **searched, **SETTINGS,
    )  # fmt: skip
    found = result["two_sided"]
    assert found["rho"] == pytest.approx(torch.log(torch.tensor(len(found["sets"]) / 1.5)).item())
    assert set(found["sets"]) | set(found["left_out"]) == {"text", "prompts", "guess"}
    assert "weighs most" in [c.title for c in tables.two_sided_table(result).columns]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"searches": [Ramp("wild")]},
            "slope: expected a number of at least 0, linear, step, reversed, random, found 'wild'",
        ),
        ({"searches": [Ramp(-1.0)]}, "slope: expected a number of at least 0"),
        ({"searches": [Ramp(1.0), Ramp("linear")]}, "searches: expected one LiNeS, found more"),
        ({"searches": [Ramp(outside="last")]}, "outside: expected mean, first, found 'last'"),  # type: ignore[arg-type]
        ({"searches": [TwoSided()], "details": Details(mean=0.5)}, "the two-sided search has none"),
        ({"searches": [TwoSided((-1.0,))]}, "lambdas: expected numbers of at least 0"),
        ({"searches": [TwoSided(min_effective_sets=99)]}, "min_effective_sets: expected a number from 1 to 2"),
    ],
)
def test_mistakes_are_told_before_the_work(world: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        restore(world / "pre", world / "post", tmp_path / "out", panel(world), **settings)
    assert not Store(tmp_path / "out.work").folder.joinpath("restore.json").exists()


def test_a_recipe_from_the_command_line_makes_the_checkpoint(world: Path, tmp_path: Path) -> None:
    data = [str(world / "pre"), str(world / "post")]
    common = ["--prompts", str(world / "prompts.jsonl"), "--reward", "world:early_letters", "--quiet"]
    common += ["--proxy-size", "16", "--max-new-tokens", "6", "--work", str(tmp_path / "work")]
    out = tmp_path / "recipe.json"
    run = CliRunner().invoke(
        app, ["search", *data, "-o", str(out), *common, "--method", "two-sided", "--lambda", "1", "--max-passes", "3"]
    )
    assert run.exit_code == 0, run.output
    assert "outside the layers" in run.output
    assert "alignment lost" in run.output
    average(*data, tmp_path / "made", Recipe.read(out))
    pair = preflight(world / "pre", tmp_path / "made")
    assert len(Recipe.read(tmp_path / "made" / "recipe.json").ratios) == 7
    assert set(pair.names)
    for wrong in (["--method", "two-sided", "--mean", "0.5"], ["--method", "hma"]):
        refused = CliRunner().invoke(app, ["search", *data, "-o", str(tmp_path / "x.json"), *common, *wrong])
        assert refused.exit_code == 1
        assert "expected --mean with --method hma, and --lambda with --method two-sided" in refused.output
