"""front.html: any result files on one page, pooled over seeds, paired where every item is there."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from typer.testing import CliRunner

from counterpoise.cli.app import app
from counterpoise.evaluation.measurement import Measurement, Scores
from counterpoise.evaluation.results import Measured, loss_units, measurement, results, write_results
from counterpoise.report import fronts, page
from counterpoise.report.comparisons import beaten_by, pooled, read_comparisons
from counterpoise.report.matched import hypervolume_gains, matched, method_gains
from counterpoise.statistics.bootstrap import over_runs, paired_difference
from counterpoise.tables import reading
from counterpoise.tables.grid import as_markdown
from report import browser, made
from report.test_report import Elements

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
DEMO, HMA = (EXPERIMENTS / name / "results" for name in ("demo", "hma"))
COMMITTED = [HMA / "real_run.json", *(DEMO / f"seed-{n}.json" for n in range(10))]


def scores(reward: float, ability: float, seed: int) -> Scores:
    """Items that all models share, and a little of each model's own."""
    shared, own = np.random.default_rng(0), np.random.default_rng([seed, int(1000 * reward)])

    def measured(value: float, n: int, metric: str, chance: float | None = None) -> Measurement:
        statistics = value + shared.normal(size=(n, 1)) + 0.2 * own.normal(size=(n, 1))
        return Measurement(metric, "nats", statistics, "mean", chance, tuple(f"{metric}{i:020}" for i in range(n)))

    first = measured(reward, 60, "reward")
    return Scores(first, {"piqa": [measured(ability, 80, "logprob")], "boolq": [measured(0.0, 50, "logprob", 0.0)]})


def run(seed: int, *, more: bool = True) -> dict[str, Any]:
    """PRE, POST, MA on a straight line between them, and L2 0.3 above it."""
    points = [Measured("PRE", "PRE", scores(0.0, 5.0, seed)), Measured("POST", "POST", scores(1.0, 3.0, seed))]
    points += [Measured(f"MA {r:g}", "MA", scores(r, 5 - 2 * r, seed), (r,), r) for r in (0.3, 0.7)]
    if more:
        points.append(Measured("L2 0.04", "L2", scores(0.5, 4.0 + 0.3, seed), settings={"weight": 0.04}))
    return results(points, run="rsf", seed=seed, reward="sentiment", about={"command": f"train --seed {seed}"})


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        write_results(folder / f"rsf-{seed}.json", run(seed))
    return sorted(folder.iterdir())


def test_a_results_file_holds_every_item(three: list[Path]) -> None:
    content, (name, point) = json.loads(three[1].read_text()), ("L2 0.04", scores(0.5, 4.3, 1))
    row = next(p for p in content["points"] if p["name"] == name)
    found = measurement(content, row, "piqa", "logprob")
    assert found is not None
    wanted = point.abilities["piqa"][0]
    np.testing.assert_allclose(found.statistics, wanted.statistics, rtol=1e-7)
    assert found.keys == tuple(k[:16] for k in wanted.keys)
    assert row["reward"]["value"] == point.reward.value
    assert row["settings"] == {"weight": 0.04}
    assert [r["name"] for r in content["tax"] if r["at_floor"]] == ["boolq"]
    assert measurement(content, row, "piqa", "accuracy") is None
    assert measurement(made.results(), made.results()["points"][0], "reward", "reward") is None


def test_results_that_cannot_be_compared_are_refused() -> None:
    pre, post = Measured("PRE", "PRE", scores(0, 5, 0)), Measured("POST", "POST", scores(1, 3, 0))
    about = {"run": "rsf", "seed": 0, "reward": "r"}
    with pytest.raises(ValueError, match=r"PRE and POST as the first two points, found \['POST', 'PRE'\]"):
        results([post, pre], **about)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'POST' twice"):
        results([pre, post, post], **about)  # type: ignore[arg-type]
    other = scores(0.5, 4, 0)
    short = other.abilities["piqa"][0]
    other.abilities["piqa"][0] = Measurement("logprob", "nats", short.statistics[:9], "mean", None, short.keys[:9])
    with pytest.raises(ValueError, match=r"the same items, but x's piqa is not PRE's"):
        results([pre, post, Measured("x", "x", other)], **about)  # type: ignore[arg-type]


def test_seeds_are_pooled_and_paired(three: list[Path]) -> None:
    (panel,) = read_comparisons(three)
    assert [(g.name, [r.seed for r in g.runs]) for g in panel.groups] == [("rsf", [0, 1, 2])]
    points = {p["name"]: p for p in pooled(panel)["points"]}
    contents = [json.loads(p.read_text()) for p in three]
    rewards = [next(p for p in c["points"] if p["name"] == "L2 0.04")["reward"] for c in contents]
    shown = points["L2 0.04"]["reward"]
    assert shown["value"] == pytest.approx(np.mean([r["value"] for r in rewards]))
    assert shown["runs"] == [r["value"] for r in rewards]
    # All share their items: pooling three runs takes away each run's own noise, and no more.
    widths = [r["high"] - r["low"] for r in rewards]
    assert 0.85 * np.mean(widths) < shown["high"] - shown["low"] < 1.02 * np.mean(widths)
    assert points["PRE"]["runs"] == 3


def test_gains_at_equal_reward_are_paired(three: list[Path]) -> None:
    (panel,) = read_comparisons(three)
    (row,) = matched(panel)
    assert row.name == "L2 0.04"
    gain = row.gains["piqa"]
    assert gain.low <= 0.3 <= gain.high
    assert len(gain.by_run) == 3
    content = json.loads(three[0].read_text())
    by_name = {p["name"]: measurement(content, p, "piqa", "logprob") for p in content["points"]}
    unpaired = next(p for p in content["points"] if p["name"] == "L2 0.04")["abilities"]["piqa"]["logprob"]
    assert gain.high - gain.low < 0.7 * (unpaired["high"] - unpaired["low"])
    a, b = by_name["L2 0.04"], by_name["MA 0.7"]
    assert a is not None
    assert b is not None
    assert paired_difference(a.statistics, b.statistics, "mean").value > gain.value  # MA 0.7 has more reward
    # boolq is at floor: retention is piqa alone, as a share of its own loss.
    units = [loss_units(r.results, "held-out", {"piqa": "logprob"}) for r in panel.runs]
    assert row.gains["retention"].value == pytest.approx(gain.value / np.mean([u["piqa"] for u in units if u]))
    (volume,) = hypervolume_gains(panel, "held-out").values()
    volumes = [reading.method_volumes(r.results, "held-out") or {} for r in panel.runs]
    wanted = [v["L2"].value - (v["L2"].reference or 0) for v in volumes]  # one of MA's two points, in the mean
    assert volumes[0]["MA"].value > (volumes[0]["L2"].reference or 0) > 0
    assert volume.seeds == pytest.approx(wanted, rel=1e-6)
    assert volume.value == pytest.approx(np.mean(wanted), rel=1e-6)
    assert volume.low < volume.value < volume.high
    # The seeds as the sample: Student's interval stands beside the one over items, in the page's tables too.
    student = ttest_1samp(gain.seeds, 0).confidence_interval()
    seeds = over_runs(gain.seeds)
    assert seeds is not None
    assert (seeds.low, seeds.high) == pytest.approx(student)
    assert seeds.p == pytest.approx(ttest_1samp(gain.seeds, 0).pvalue)
    for table in (fronts.matched_table(panel, [row]), fronts.hypervolume_table(panel)):
        assert ", 3 runs" in as_markdown(table)
    # The same without the items: the value stays, the interval goes.
    stripped = [{k: v for k, v in json.loads(p.read_text()).items() if k != "items"} for p in three[:1]]
    path = three[0].parent.parent / "stripped.json"
    path.write_text(json.dumps(stripped[0]))
    (bare,) = matched(read_comparisons([path])[0])
    (whole,) = matched(read_comparisons(three[:1])[0])
    assert bare.gains["piqa"].value == pytest.approx(whole.gains["piqa"].value)
    assert math.isnan(bare.gains["piqa"].low)


def test_an_ability_at_floor_in_one_run_is_left_out_in_all(three: list[Path], tmp_path: Path) -> None:
    paths = []
    for seed, path in enumerate(three):
        content = json.loads(path.read_text())
        for row in content["tax"]:
            row["at_floor"] = row["at_floor"] and seed == 0  # boolq is at floor in the first run alone
        paths.append(tmp_path / path.name)
        paths[-1].write_text(json.dumps(content))
    (panel,) = read_comparisons(paths)
    assert panel.groups[0].floored == {"boolq"}
    (mixed,), (alike,) = matched(panel), matched(read_comparisons(three)[0])
    assert mixed.gains["retention"] == alike.gains["retention"]
    gain = method_gains(panel.groups[0], "L2", "held-out")
    assert gain is not None
    assert gain == mixed.gains["retention"]  # L2 has one point
    assert method_gains(panel.groups[0], "KD", "held-out") is None
    content = json.loads(paths[1].read_text())
    content["floored"] = ["piqa"]  # then no ability is left that counts in all runs
    paths[1].write_text(json.dumps(content))
    (nothing,) = read_comparisons(paths)
    assert method_gains(nothing.groups[0], "L2", "held-out") is None
    assert hypervolume_gains(nothing, "held-out") == {}
    assert "retention" not in matched(nothing)[0].gains


def test_files_of_one_run_and_seed_are_joined(tmp_path: Path) -> None:
    write_results(tmp_path / "base.json", run(0, more=False))
    write_results(tmp_path / "l2.json", run(0))
    (panel,) = read_comparisons([tmp_path / "base.json", tmp_path / "l2.json"])
    assert [r.files for r in panel.runs] == [("base", "l2")]
    assert [p["name"] for p in pooled(panel)["points"]] == ["PRE", "POST", "MA 0.3", "MA 0.7", "L2 0.04"]
    assert len(matched(panel)) == 1
    stale = run(0)
    stale["points"][2]["reward"]["value"] += 0.1
    write_results(tmp_path / "stale.json", stale)
    with pytest.raises(ValueError, match=r"stale: MA 0\.3 of run 'rsf', seed 0, has another reward"):
        read_comparisons([tmp_path / "base.json", tmp_path / "stale.json"])
    other = run(0)
    other["items"]["held-out"]["piqa"]["logprob"]["keys"][0] = "another"
    write_results(tmp_path / "other.json", other)
    with pytest.raises(ValueError, match="measured on other items"):
        read_comparisons([tmp_path / "base.json", tmp_path / "other.json"])


def test_other_runs_are_not_pooled_but_named(tmp_path: Path) -> None:
    for name in ("rsf", "dpo"):
        write_results(tmp_path / f"{name}.json", {**run(0), "run": name})
    (panel,) = read_comparisons([tmp_path / "rsf.json", tmp_path / "dpo.json"])
    points = pooled(panel)["points"]
    assert [p["name"] for p in points if p["method"] == "PRE"] == ["PRE"]
    assert {p["method"] for p in points} == {"PRE", "POST", "MA (rsf)", "L2 (rsf)", "MA (dpo)", "L2 (dpo)"}
    figure = fronts.front_figure(pooled(panel), "piqa", "held-out")
    marks = {
        t.legendgroup: (t.marker.color, t.marker.symbol) for t in figure.data if t.mode == "markers" and t.legendgroup
    }
    assert marks["MA (rsf)"][0] == marks["MA (dpo)"][0] != marks["L2 (dpo)"][0]  # a colour a method, a mark a group
    assert marks["MA (rsf)"][1] != marks["MA (dpo)"][1] == marks["L2 (dpo)"][1]
    # Without a name, equal commands of equal seeds may be two alignments: they stay apart too.
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "restore.json").write_text(json.dumps(made.results()))
    (panel,) = read_comparisons([tmp_path / "a" / "restore.json", tmp_path / "b" / "restore.json"])
    assert [g.name for g in panel.groups] == ["a/restore", "b/restore"]


def both_ways(tmp_path: Path, name: str, *, turned: bool = False) -> Path:
    """A run whose piqa loses in likelihood, and whose accuracy does not move but for the point L2, which gains."""

    def model(reward: float, ability: float, right: float) -> Scores:
        found = scores(reward, ability, 0)
        steps = np.random.default_rng(1).normal(size=(80, 1)) + right
        keys = tuple(f"accuracy{i:020}" for i in range(80))
        more = [*found.abilities["piqa"], Measurement("accuracy", "%", steps, "mean", None, keys)]
        return Scores(found.reward, {"piqa": more[::-1] if turned else more})

    points = [Measured("PRE", "PRE", model(0, 5, 60)), Measured("POST", "POST", model(1, 3, 60))]
    points += [Measured("MA 0.5", "MA", model(0.5, 4, 60), (0.5,), 0.5), Measured("L2 1", "L2", model(0.5, 3.5, 61))]
    path = tmp_path / f"{name}.json"
    write_results(path, results(points, run="both", seed=0, reward="sentiment"))
    return path


def test_likelihood_and_accuracy_stand_side_by_side_from_the_items(tmp_path: Path) -> None:
    (panel,) = read_comparisons([both_ways(tmp_path, "both")])
    _, by_likelihood, by_accuracy = reading.MEANS
    points = {p["name"]: p["retention_by"] for p in pooled(panel)["points"]}
    assert points["POST"]["likelihood"]["value"] == pytest.approx(-1)
    assert points["POST"]["accuracy"]["value"] == 0
    (row,) = matched(panel)
    assert row.gains[by_likelihood] == row.gains["retention"]  # the metric that counts, of the one ability
    assert row.gains[by_likelihood].high < 0 < row.gains[by_accuracy].low
    assert method_gains(panel.groups[0], "L2", "held-out", by_accuracy) == row.gains[by_accuracy]
    page = Elements(fronts.fronts_page([panel]))
    assert f"{by_accuracy}|held-out" in page.figures["front-1"]
    title = page.figures["front-1"][f"{by_accuracy}|held-out"]["layout"]["xaxis"]["title"]["text"]
    assert title == "Retention by accuracy: minus the tax left<br>0: PRE; −1: all that each ability lost"


def test_another_metric_or_another_unit_is_another_front_and_it_says_why(tmp_path: Path) -> None:
    first, turned = both_ways(tmp_path, "likely"), both_ways(tmp_path, "right", turned=True)
    old = json.loads(first.read_text())
    del old["items"], old["retention_unit"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    panels = read_comparisons([first, turned, tmp_path / "old.json"])
    assert [p.runs[0].files for p in panels] == [("likely",), ("right",), ("old",)]
    metric = "not on one front with right: it counts piqa by logprob, they by accuracy"
    unit = "not on one front with old: its retention is a share of own loss, theirs a number in the unit of an older version"
    assert metric in panels[0].notes
    assert any(note.startswith(unit) for note in panels[0].notes)
    assert len(panels[2].notes) == 2
    assert reading.axis_label(pooled(panels[2]), "retention") == "retention, older unit"
    said = CliRunner().invoke(app, ["front", str(first), str(turned), "-o", str(tmp_path / "front.html")])
    assert f"  {metric}" in said.output
    named = json.loads((tmp_path / "old.json").read_text()) | {"retention_unit": reading.OWN_LOSS}
    (tmp_path / "old.json").write_text(json.dumps(named))
    assert len(read_comparisons([first, tmp_path / "old.json"])) == 1


def test_the_committed_results_are_drawn(tmp_path: Path) -> None:
    panels = read_comparisons(COMMITTED)
    assert len(panels) == 2
    real = next(p for p in panels if p.reward)
    assert real.runs[0].files == ("real_run",)
    recorded = json.loads((EXPERIMENTS / "hma" / "results" / "real_run.json").read_text())["hypervolume"]
    found = fronts.hypervolumes(real.runs[0].results)
    assert {m: found[m] for m in recorded} == pytest.approx(recorded)
    gains = {r.name: r.gains for r in matched(real)}
    assert gains["HMA 0.6"]["retention"].value < 0  # the finding of that experiment
    demo = next(p for p in panels if not p.reward)
    assert len(demo.groups) == 1
    assert len(demo.runs) == 10
    page = Elements(fronts.fronts_page(panels))
    assert set(page.figures) == {"front-1", "front-2"}
    assert "11 runs on 2 fronts" in page.text
    assert "These files hold no points of MA" not in page.text  # one seed picked it
    content = json.loads(COMMITTED[-1].read_text(encoding="utf-8"))
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps({**content, "points": [p for p in content["points"] if p["method"] != "MA"]}))
    assert "These files hold no points of MA" in Elements(fronts.fronts_page(read_comparisons([bare]))).text


def test_who_beats_whom() -> None:
    found = made.results()
    for point in found["points"]:
        on_front = not beaten_by(found, point)
        assert on_front == point["on_front"], point["name"]


def test_every_method_has_a_colour_of_its_own() -> None:
    methods = ["PRE", "POST", "MA", "HMA", "LiNeS", "L1", "L2", "KD", "LoRA", "replay", "SMA", "TIES", "DARE"]
    looks = fronts.looks(methods)
    assert len({looks[m].colour for m in methods[2:]}) == 11
    assert looks["PRE"].colour == looks["POST"].colour
    many = fronts.looks([f"m{i}" for i in range(40)])
    assert len(set(many.values())) == 40
    (panel,) = read_comparisons([EXPERIMENTS / "hma" / "results" / "real_run.json"])
    figure = fronts.front_figure(pooled(panel), "retention", "validation")
    colours = {t.legendgroup: t.marker.color for t in figure.data if t.mode == "markers" and t.legendgroup}
    assert colours["HMA"] == fronts.look_of("HMA").colour


def test_files_that_are_no_results(tmp_path: Path) -> None:
    for text, message in {
        "rubbish": "expected json, found 'rubbish'",
        "[]": "with points, found a list",
        '{"points": []}': "with points, found none",
        '{"points": [{"name": "a"}]}': "points\\[0\\].method: expected a text, found 'None'",
    }.items():
        (tmp_path / "f.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_comparisons([tmp_path / "f.json"])
    with pytest.raises(ValueError, match="at least one result file"):
        read_comparisons([])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"points": [None]}, r"points\[0\]: expected an object, found 'None'"),
        ({"points": [{"name": "a", "method": 3}]}, r"points\[0\].method: expected a text, found '3'"),
        ({"tax": {"a": 1}}, "tax: expected a list"),
        ({"seed": []}, "seed: expected a whole number"),
        ({"hypervolume": {"MA": "x"}}, "hypervolume.MA: expected a number, found 'x'"),
        ({"points": [{"name": "a", "method": "b", "reward": {"value": 1, "low": float("inf")}}]}, "low: expected a finite"),
        ({"items": {"x": {"reward": {"reward": {"keys": ["k"], "aggregate": "mean"}}}},
          "points": [{"name": "a", "method": "b", "part": "x", "statistics": {"reward": {"reward": [1, 2]}}}]},
         r"points\[0\].statistics.reward.reward: expected one row of one length for each of the items' keys, found 2"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_named_with_its_place(tmp_path: Path, broken: dict[str, Any], message: str) -> None:
    (tmp_path / "f.json").write_text(json.dumps({**made.results(), **broken}))
    with pytest.raises(ValueError, match=f"f.json: .*{message}"):
        read_comparisons([tmp_path / "f.json"])


def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    bad = made.hostile()
    for point in bad["points"]:
        point["method"] = "<img src=x>" if point["method"] == "LiNeS" else point["method"]
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    panels = read_comparisons([tmp_path / "bad.json"])
    before = copy.deepcopy(panels[0].runs[0].results)
    found = Elements(fronts.fronts_page(panels))
    assert [tag for tag, _ in found.tags if tag in ("script", "img")] == ["script"] * 4
    assert panels[0].runs[0].results == before


def test_the_command_and_the_page_in_a_browser(three: list[Path], tab: browser.Browser, tmp_path: Path) -> None:
    out = tmp_path / "front.html"
    done = CliRunner().invoke(app, ["front", *map(str, three), *map(str, COMMITTED[:2]), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "sentiment: rsf\n" in done.output
    for width in (1280, 400):
        tab.open(out, width=width, dark=width == 400)
        assert tab.complaints() == []
        assert tab.requests() == [out.as_uri()]
        assert tab.value("document.documentElement.scrollWidth") == width
        assert (
            tab.value("[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.point').length > 3)")
            == [True] * 3
        )
    changed = tab.value("""(() => {
        const menu = document.querySelector("select");
        menu.selectedIndex = 1;
        menu.dispatchEvent(new Event("change"));
        return document.querySelector(".plot").layout.xaxis.title.text;
    })()""")
    assert changed == "piqa: logprob (nats)"
    failed = CliRunner().invoke(app, ["front", str(tmp_path / "none.json"), "-o", str(out)])
    assert failed.exit_code == 1
    assert "error:" in failed.output
    assert page.page("t", "", {}).count("<script") == 4
