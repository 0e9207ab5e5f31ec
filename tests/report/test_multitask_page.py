"""The page of a multi-task run: with two tasks and with many, whole without some of its parts, drawn by a browser."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from counterpoise.records import write_whole
from counterpoise.report import history, multitask
from report.test_report import Elements

HOSTILE = "<img src=x onerror=alert(1)>|\"'&"


def record(m: int = 14, epochs: int = 6, *, weights: bool = True, first: str = "task 0") -> dict[str, Any]:
    """What `counterpoise multitask train` writes, with losses that fall at a rate of each task's own."""
    names = [first, *(f"task {i}" for i in range(1, m))]
    rate = {t: 0.1 + 0.3 * i / m for i, t in enumerate(names)}
    rounds = []
    for number in [1, *range(10, 50 * epochs + 1, 10)]:
        losses = {t: math.exp(-rate[t] * number / 50) for t in names}
        total = sum(math.exp(x) for x in losses.values())
        found = {"round": float(number), "task_variance": 0.01, "effective_tasks": 0.8 * m}
        found |= {f"loss/{t}": x for t, x in losses.items()}
        rounds.append(found | ({f"weight/{t}": math.exp(x) / total for t, x in losses.items()} if weights else {}))
    done = [
        {
            "epoch": e,
            "seconds": 12.0 * e,
            "train_loss": {t: math.exp(-rate[t] * e) for t in names},
            "task_variance": 0.02 / e,
            "validation_loss": {t: math.exp(-0.8 * rate[t] * e) for t in names},
            "validation_accuracy": {t: 1 - 0.5 * math.exp(-rate[t] * e) for t in names},
        }
        for e in range(1, epochs + 1)
    ]
    tested = {t: {"accuracy": 0.6 + 0.35 * i / m, "loss": 0.5, "examples": 400} for i, t in enumerate(names)}
    return {
        "data": "reviews/", "weighting": "bandit", "min_effective_tasks": m / 2, "rho": 0.69, "eta": 0.5, "seed": 0,
        "model": "textcnn", "batch_size": 32, "examples": {t: [1600, 200, 400] for t in names},
        "command": "counterpoise multitask train", "date": "2026-01-01", "versions": {"torch": "2"}, "epochs": done,
        "rounds": rounds, "best_epoch": epochs - 1, "stopped": "all epochs done", "test": tested,
    }  # fmt: skip


@pytest.mark.parametrize(("m", "width"), [(1, 1280), (2, 1280), (2, 390), (14, 390), (30, 390)])
def test_the_browser_draws_all_figures_and_complains_of_nothing(tab, tmp_path, m, width):
    write_whole(tmp_path / "report.html", multitask.multitask_page(record(m)))
    tab.open(tmp_path / "report.html", width=width)
    drawn = (
        "[...document.querySelectorAll('.plot')].map((p) => [p.dataset.figure, p.querySelectorAll('.main-svg').length])"
    )
    found = dict(tab.value(drawn))
    assert list(found) == ["accuracies", "curves"] + (["weights", "variance"] if m > 1 else [])
    assert all(found.values())
    assert tab.complaints() == []
    assert [url.rsplit("/", 1)[-1] for url in tab.requests()] == ["report.html"]
    assert tab.value("document.documentElement.scrollWidth") == width


def test_the_menu_shows_another_number(tab, tmp_path):
    write_whole(tmp_path / "report.html", multitask.multitask_page(record(14)))
    tab.open(tmp_path / "report.html")
    choose = """((place, menu, option) => {
        const box = document.querySelector(`[data-figure=${place}]`);
        const select = box.closest("figure").querySelectorAll("select")[menu];
        select.selectedIndex = option;
        select.dispatchEvent(new Event("change"));
        return [box.layout.yaxis.title.text, box.data.filter((t) => t.showlegend).map((t) => t.name)];
    })"""
    assert tab.value(f"{choose}('curves', 0, 0)") == ["Training loss (nats)", ["task 0", "task 13"]]
    assert tab.value(f"{choose}('curves', 0, 2)") == ["Validation accuracy", ["task 0", "task 13"]]
    assert tab.complaints() == []


def test_names_from_outside_stay_text(tab, tmp_path):
    hostile = record(14, first=HOSTILE) | {"data": HOSTILE, "command": HOSTILE}
    write_whole(tmp_path / "hostile.html", multitask.multitask_page(hostile))
    tab.open(tmp_path / "hostile.html", width=400)
    assert tab.complaints() == []
    assert tab.value("document.querySelectorAll('img').length") == 0
    assert HOSTILE in tab.value("document.querySelector('h1').textContent")
    assert HOSTILE in tab.value("[...document.querySelectorAll('tbody th')].map((cell) => cell.textContent)")
    assert tab.value("document.documentElement.scrollWidth") == 400


def test_the_figures_hold_the_numbers_of_the_record():
    made = record(2)
    figures = Elements(multitask.multitask_page(made)).figures
    validation, test = figures["accuracies"][""]["data"]
    assert test["x"] == pytest.approx([100 * made["test"][t]["accuracy"] for t in ("task 0", "task 1")])
    assert validation["x"] == pytest.approx(
        [100 * made["epochs"][4]["validation_accuracy"][f"task {i}"] for i in (0, 1)]
    )
    assert set(figures["curves"]) == {"train_loss", "validation_loss", "validation_accuracy"}
    for kind, shown in figures["curves"].items():
        for i, line in enumerate(shown["data"]):
            assert line["y"] == pytest.approx([e[kind][f"task {i}"] for e in made["epochs"]])
            assert line["x"] == [1, 2, 3, 4, 5, 6]
    first, second = figures["weights"][""]["data"]
    assert [a + b for a, b in zip(first["y"], second["y"], strict=True)] == pytest.approx([100.0] * len(first["y"]))
    assert first["x"] == pytest.approx([r["round"] / 50 for r in made["rounds"]])
    training, validation = figures["variance"][""]["data"]
    assert training["y"] == pytest.approx([e["task_variance"] for e in made["epochs"]])
    a, b = made["epochs"][0]["validation_loss"].values()
    assert validation["y"][0] == pytest.approx((a - b) ** 2 / 4)


def test_of_many_tasks_the_ones_that_end_highest_and_lowest_are_picked_out():
    for m, named in ((14, ["task 0", "task 13"]), (6, [f"task {i}" for i in range(6)])):
        lines = Elements(multitask.multitask_page(record(m))).figures["weights"][""]["data"]
        assert [line["name"] for line in lines if line["showlegend"]] == named
        assert len(lines) == m


def test_the_verdict_names_mean_and_extremes():
    text = Elements(multitask.multitask_page(record(14))).text
    assert "Mean test accuracy 76.2\N{NO-BREAK SPACE}%, from 60.0\N{NO-BREAK SPACE}% (task 0)" in text
    assert "bandit (at least 7 effective tasks, rho 0.69, eta 0.5, 11.2 of 14 effective at the end)" in text
    untested = {k: v for k, v in record(2).items() if k != "test"}
    assert "Mean validation accuracy" in Elements(multitask.multitask_page(untested)).text
    assert "No accuracy was recorded." in multitask.multitask_page({})


@pytest.mark.parametrize(
    "key", ["rounds", "test", "examples", "batch_size", "best_epoch", "weighting", "command", "rho"]
)
@pytest.mark.parametrize("how", ["absent", "none"])
def test_a_part_may_be_missing(key, how):
    found = record(3)
    if how == "absent":
        del found[key]
    else:
        found[key] = None
    page = Elements(multitask.multitask_page(found))
    expected = {"accuracies", "curves", "weights", "variance"} - ({"weights"} if key == "rounds" else set())
    assert set(page.figures) == expected
    assert [a["data-figure"] for _, a in page.tags if "data-figure" in a] == [
        name for name in ("accuracies", "curves", "weights", "variance") if name in expected
    ]


def test_a_method_without_weights_shows_none():
    assert "weights" not in Elements(multitask.multitask_page(record(3, weights=False))).figures


def test_values_that_are_no_numbers_are_left_out():
    found = record(2)
    found["rounds"][3]["task_variance"] = math.nan
    found["rounds"][3]["weight/task 1"] = math.inf
    found["epochs"][2]["validation_loss"]["task 0"] = math.nan
    figures = Elements(multitask.multitask_page(found)).figures
    assert len(figures["curves"]["validation_loss"]["data"][0]["x"]) == 5
    assert len(figures["weights"][""]["data"][0]["x"]) == len(found["rounds"]) - 1
    assert len(figures["variance"][""]["data"][1]["x"]) == 5


def test_long_runs_are_thinned_and_short_ones_are_not():
    assert len(history.by_round(record(2, epochs=200), "task_variance").values) <= history.MOST_POINTS
    curve = history.by_round(record(2), "loss/task 1")
    assert curve.values == [r["loss/task 1"] for r in record(2)["rounds"]]
    long = history.by_round(record(2, epochs=200), "loss/task 1")
    assert long.values == sorted(long.values, reverse=True)


def test_records_are_only_read():
    found = record(3)
    before = copy.deepcopy(found)
    multitask.multitask_page(found)
    assert json.dumps(found) == json.dumps(before)
