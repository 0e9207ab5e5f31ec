"""A results file of models that were really measured, and what the page makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.results import Measured, measurement, results, write_results
from counterpoise.evaluation.workbench import Workbench
from counterpoise.records import Store
from counterpoise.report.comparisons import pooled, read_comparisons
from counterpoise.report.matched import hypervolume_gains, matched
from counterpoise.statistics.bootstrap import interval
from world import make, panel


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    folder = make(tmp_path_factory.mktemp("world"))
    return Workbench(preflight(folder / "pre", folder / "post"), panel(folder), Store(folder / "store"))


def test_a_run_from_the_store_to_the_page(bench: Workbench, tmp_path: Path) -> None:
    cut = bench.whole
    wanted = [
        ("PRE", "PRE", 0.0),
        ("POST", "POST", 1.0),
        ("MA 0.3", "MA", 0.3),
        ("MA 0.7", "MA", 0.7),
        ("other", "other", 0.5),
    ]
    points = [bench.point(m, cut, [r], "held-out", name=n) for n, m, r in wanted]
    measured = [Measured(p.name, p.method, p.scores, p.model.ratios, p.mean) for p in points]
    write_results(tmp_path / "run.json", results(measured, run="rsf", seed=0, reward="letters", about={"command": "x"}))

    content = json.loads((tmp_path / "run.json").read_text())
    for point, row in zip(points, content["points"], strict=True):
        assert row["reward"]["value"] == point.scores.reward.value
        for name, measurements in point.scores.abilities.items():
            for m in measurements:
                read = measurement(content, row, name, m.metric)
                assert read is not None
                assert read.aggregate == m.aggregate
                np.testing.assert_allclose(read.statistics, m.statistics, rtol=1e-7)
                shown = row["abilities"][name][m.metric]
                assert (shown["value"], shown["low"]) == pytest.approx(interval(read.statistics, read.aggregate)[:2])

    (found,) = read_comparisons([tmp_path / "run.json"])
    assert [p["name"] for p in pooled(found)["points"]] == [n for n, _, _ in wanted]
    (row,) = matched(found)
    # MA 0.5 under another name lies near the line through MA 0.3 and MA 0.7: no ability may differ for certain by much.
    gain = row.gains["text"]
    spread = points[0].scores.abilities["text"][0].value - points[1].scores.abilities["text"][0].value
    assert abs(gain.value) < abs(spread)
    assert gain.low <= gain.value <= gain.high
    assert set(hypervolume_gains(found, "held-out")) <= {("rsf", "other")}
