"""`restore --heal`: healed points beside the averages on one front, picked, written in POST's dtype, and told of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import counterpoise
from counterpoise import Heal
from counterpoise.cli.app import app
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
        "heal": Heal(6, start),
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
    assert all(row["line"]["distance"] > 0 for row in told["points"])
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
