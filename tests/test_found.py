"""Results as Python holds them: typed, read-only, rows for a data frame, and read back from the files of every version."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pandas
import pytest

from counterpoise import Aligned, Restored, Taxed
from counterpoise.records import Result, public
from pages import ROOT

KEPT = "demo/results/seed-0 hma/results/real_run two_sided/results/dpo-0 winning/worlds/world-0"


@pytest.mark.parametrize("name", KEPT.split())
def test_committed_results_of_earlier_versions_are_read(name: str) -> None:
    path = ROOT / "experiments" / f"{name}.json"
    found, held = Restored.from_json(path), json.loads(path.read_text())
    table = pandas.DataFrame(found.points)
    assert table["name"].tolist() == [p["name"] for p in held["points"]]
    assert table["reward"].tolist() == [p["reward"]["value"] for p in held["points"]]
    assert {"reward_low", "reward_high", "retention"} <= set(table)
    assert "statistics" not in " ".join(table)
    assert (found.pick, found.verdict) == (held.get("pick"), held.get("verdict", ""))
    assert found._repr_html_().count("<table") == ("tax" in held)


def test_a_committed_tax_is_read() -> None:
    path = ROOT / "experiments" / "distance" / "results" / "demo-0-RSF-1e-3.json"
    found, held = Taxed.from_json(path), json.loads(path.read_text())
    assert found.verdict == held["verdict"]
    assert [row["tax"] for row in found.tax] == [row["tax"]["value"] for row in held["tax"]]


def content() -> dict[str, Any]:
    def score(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.5, "high": value + 0.5}

    points = [
        {"name": name, "method": name[:4].strip(), "part": part, "mean": mean, "ratios": [mean], "reward": score(mean),
         "retention": {**score(-mean), "of": 2}, "abilities": {"arc": {"accuracy": score(50 - mean)}}, "on_front": True}
        for part in ("validation", "held-out") for name, mean in (("PRE", 0.0), ("POST", 1.0), ("MA 0.5", 0.5))
    ]  # fmt: skip
    gap = {**score(1.0), "p": 0.01}
    row = {"name": "arc", "metric": "accuracy", "unit": "%", "pre": score(50), "post": score(49), "pick": score(49.5)}
    tax = [{**row, "tax": gap, "remaining": gap, "at_floor": False}]
    about = {
        "retention_unit": "share of own loss",
        "seconds": 2.5,
        "warnings": ["<odd>"],
        "settings": {"keep_reward": 0.4},
    }
    return {
        "verdict": "MA 0.5 keeps <half>.",
        "pick": "MA 0.5",
        "out": "restored",
        "points": points,
        "tax": tax,
        **about,
    }


def test_a_result_is_typed_frozen_and_goes_to_json_and_back(tmp_path: Path) -> None:
    found = Restored.from_json(content())
    assert (found.verdict, found.pick, found.out, found.seconds) == ("MA 0.5 keeps <half>.", "MA 0.5", "restored", 2.5)
    assert found.warnings == ["<odd>"]
    with pytest.raises(FrozenInstanceError):
        found.pick = "PRE"  # type: ignore[misc]
    with pytest.raises(TypeError):
        found["pick"] = "PRE"  # type: ignore[index]
    assert found["settings"] == {"keep_reward": 0.4}
    assert found == content() == found.to_json()
    (tmp_path / "restore.json").write_text(json.dumps(found.to_json()))
    again = Restored.from_json(tmp_path / "restore.json")
    assert again.points == found.points
    assert again.to_json() == found.to_json()
    assert public({"a": found.to_json()})["a"] == found
    assert Restored.from_json({}).points == []


def test_rows_are_what_pandas_takes() -> None:
    found = Restored.from_json(content())
    table = pandas.DataFrame(found.points).query("part == 'held-out'").set_index("name")
    assert table.loc[found.pick, ["reward", "reward_low", "retention", "arc accuracy"]].tolist() == [0.5, 0, -0.5, 49.5]
    taxes = pandas.DataFrame(found.tax)
    assert taxes.loc[0, ["name", "pre", "tax", "tax_p"]].tolist() == ["arc", 50, 1.0, 0.01]


@pytest.mark.parametrize("kind", [Restored, Taxed])
def test_a_notebook_shows_verdict_figure_and_taxes_escaped_and_small(kind: type[Taxed]) -> None:
    shown = kind.from_json(content())._repr_html_()
    assert "<strong>MA 0.5 keeps &lt;half&gt;.</strong>" in shown
    assert "plotly" in shown
    assert "<table" in shown
    assert len(shown) < 40_000


def test_what_aligned_tells_is_shown_too() -> None:
    found = Aligned.from_json(
        {"settings": {"method": "rsf"}, "iterations": 3, "metrics": {"reward": 1.23456, "kept": "x"}}
    )
    assert (found.iterations, found.metrics["reward"]) == (3, 1.23456)
    assert "rsf, 3 iterations" in found._repr_html_()
    assert "1.235" in found._repr_html_()


@pytest.mark.parametrize("kind", [Restored, Taxed, Aligned])
def test_what_is_no_result_is_refused(kind: type[Result], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.json: expected a (result file|json object)"):
        kind.from_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        kind.from_json(tmp_path / "none.json")
