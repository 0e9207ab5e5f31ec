"""`restore --heal`: healed points beside the averages on one front, picked, written in POST's dtype, and told of."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import counterpoise
from counterpoise import Heal
from counterpoise.averaging.partition import layerwise
from counterpoise.cli.app import app
from counterpoise.restoration.request import Request
from counterpoise.search.candidates import HMA
from counterpoise.search.hma import linear_ramp
from test_refusals import RESTORE
from tiny import tokenizer
from world import make, panel, searches

GIVEN: dict[str, Any] = {**searches(hma=False, controls=False)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def few_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterpoise.alignment.heal.CHECKED", 12)


def in_bfloat16(world: Path, folder: Path) -> Path:
    for side in ("pre", "post"):
        model = AutoModelForCausalLM.from_pretrained(world / side, dtype=torch.bfloat16)
        model.save_pretrained(folder / side)
        tokenizer().save_pretrained(folder / side)
    return folder


@pytest.mark.parametrize("start", ["POST", "LiNeS 0.8", "pick"])
def test_healed_points_may_be_picked_and_what_was_measured_is_written(start: str, world: Path, tmp_path: Path) -> None:
    pair = in_bfloat16(world, tmp_path) if start == "POST" else world
    # "pick": an average that may be picked; else one that keeps too little
    means = {"means": [0.3], "keep_reward": 0.0} if start == "pick" else {"means": [0.05], "keep_reward": 0.2}
    how: dict[str, Any] = {
        **GIVEN,
        **means,
        "heal": Heal(6, start, openings=40 if start == "pick" else None),
        "details": counterpoise.Details(dtype=torch.float32),
    }
    found = counterpoise.restore(
        pair / "pre", pair / "post", tmp_path / "out", panel(world, limit=8, prompt_limit=12), **how
    )
    rows = {p["name"]: p for p in found["points"] if p["part"] == "validation"}
    name = "MA 0.3" if start == "pick" else start
    assert [n for n in rows if "healed" in n] == [f"{name} healed 5", f"{name} healed 6"]
    assert rows[f"{name} healed 6"]["ratios"] == []
    assert rows[f"{name} healed 6"]["mean"] is None
    told = found["healed"]
    assert told["start"] == name
    assert told["drawn"] > told["trained"] > 0
    lines = next((tmp_path / "out.work").glob("heal-*/run/metrics.jsonl")).read_text().splitlines()
    assert told["drawn"] == sum(json.loads(line)["drawn"] for line in lines)
    assert all(row["line"]["distance"] > 0 for row in told["points"])
    assert {"keep/openings" in row for row in told["points"]} == {start == "pick"}
    if start == "pick":
        return
    assert "healed" in found["pick"]
    card, recipe = (
        (tmp_path / "out" / "README.md").read_text(),
        json.loads((tmp_path / "out" / "recipe.json").read_text()),
    )
    assert "# Healed checkpoint" in card
    assert f"{name} was healed" in card
    assert recipe["settings"]["healed"]["start"] == name
    assert "was healed" in (tmp_path / "out" / "report.html").read_text()
    written, post = (counterpoise.open_checkpoint(folder) for folder in (tmp_path / "out", pair / "post"))
    assert {n: written.dtype(n) for n in written} == {n: post.dtype(n) for n in post}
    at = next((tmp_path / "out.work").glob("heal-*")) / "run" / f"iteration-{1 + (found['pick'][-1] == '6'):04d}"
    point = counterpoise.open_checkpoint(at)
    assert all(torch.equal(written[n], point[n].to(written.dtype(n))) for n in written)
    again = counterpoise.restore(
        pair / "pre", pair / "post", tmp_path / "out", panel(world, limit=8, prompt_limit=12), **how
    )
    assert again["already_finished"]


def test_teachers_of_other_words_are_refused_before_anything_is_measured(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    path = Path("pre/tokenizer.json")
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    content["model"]["vocab"] = {w: (i + 7) % len(words) for w, i in words.items()}
    path.write_text(json.dumps(content))
    for more in ([], ["--dry-run", "--speed", "1e9,1e9"]):
        said = CliRunner().invoke(app, [*RESTORE.split(), "--heal", "5", *more])
        assert said.exit_code == 1
        assert "tokens two ids, first" in " ".join(said.output.split())
    assert not Path("out.work").exists()


def test_the_dry_run_counts_healing(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    plain, healed = (
        CliRunner().invoke(app, [*RESTORE.split(), *more, "--dry-run", "--speed", "1e9,1e9"])
        for more in ([], ["--heal", "10", "--heal-from", "LiNeS 0.8"])
    )
    assert healed.exit_code == 0, healed.output
    assert "healing: lessons" in healed.output
    assert "healing from LiNeS 0.8" in healed.output
    assert "healing" not in plain.output
    amounts = [re.search(r"to be written: ([\d.]+) (kB|MB)", said.output) for said in (plain, healed)]
    few, more = (float(m[1]) * {"kB": 1, "MB": 1000}[m[2]] for m in amounts if m)
    assert more > 10 * few


@pytest.mark.parametrize("start", ["MA 0.8", "LiNeS 1", "step .7", "slope 2 0.8", "slope 0.5 0.25", "POST", "PRE"])
def test_a_ramp_to_begin_with_is_that_of_the_grid(start: str, world: Path) -> None:
    Heal(5, start).check()
    found = Heal(5, start).ramp
    assert found is not None
    slope, mean = found
    cut = layerwise(counterpoise.open_checkpoint(world / "pre"))
    assert cut.mean(linear_ramp(cut, mean, slope)) == pytest.approx(mean)
    assert mean == {"POST": 1.0, "PRE": 0.0}.get(start) or f"{mean:g}" in start.replace(" .", " 0.")


@pytest.mark.parametrize(
    "start", ["", "LiNeS", "slope 0.8", "slope -1 0.5", "step 1.2", "MA x", "HMA 0.5", "slope nan 0.5", "pick 1"]
)
def test_a_start_that_is_none_is_refused(start: str) -> None:
    with pytest.raises(ValueError, match="heal_from: expected POST, PRE, pick, or a ramp"):
        Heal(5, start).check()


def test_healing_is_not_advised_where_there_is_nothing_to_heal(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    few = "--abilities continue:text.jsonl --prompt-limit 12 --means 0.3 --keep-reward 0.2 --blocks 2 --no-controls".split()
    for pair, advised in (("post pre", False), ("pre post", True)):
        asked = RESTORE.replace("restore pre post", f"restore {pair}").split()
        said = CliRunner().invoke(app, [*asked, "-o", str(tmp_path / pair[:3]), *few])
        assert said.exit_code == 0, said.output
        assert ("healing may give back more" in said.output) == advised, said.output


@pytest.mark.parametrize("how", [{}, {"mean": 0.8}, {"fast": True}, {"shard": 2}, {"race": True}, {"keep_reward": 0.5}])
def test_healing_is_advised_where_it_is_taken(how: dict[str, Any], world: Path, tmp_path: Path) -> None:
    asked = Request(world / "pre", world / "post", tmp_path / "out", searches=(HMA(),), **how)
    if (why := asked.no_healing) is None:
        replace(asked, heal=Heal(20)).check(1)
    else:
        with pytest.raises(ValueError, match=re.escape(why)):
            replace(asked, heal=Heal(20)).check(1)
    assert (why is None) == (how.keys() <= {"race", "keep_reward"})
