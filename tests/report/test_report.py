"""The page: self-contained, whole without some of its parts, and working in a browser."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from counterpoise import records
from counterpoise.report import html, page, plots
from report import browser, made

WITHOUT = ["pick", "search", "tax", "points", "partition", "hypervolume", "inputs", "settings", "warnings", "verdict"]


class Elements(HTMLParser):
    """The tags of a page with their attributes, its text and its data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.figures: dict[str, Any] = {}
        self._within = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within = "figures" if ("id", "figures") in attrs else tag

    def handle_data(self, data: str) -> None:
        if self._within == "figures":
            self.figures, self._within = json.loads(data), ""
        elif self._within not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def opened(tab: browser.Browser, tmp_path_factory: pytest.TempPathFactory) -> browser.Browser:
    """The whole page, open at the width of a desktop."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    records.write_whole(path, html.report_page(made.results()))
    tab.open(path)
    return tab


def menu(which: int, option: int) -> str:
    """JavaScript that chooses from a menu of the first figure and returns the title of its horizontal axis."""
    return f"""(() => {{
        const menu = document.querySelectorAll("select")[{which}];
        menu.selectedIndex = {option};
        menu.dispatchEvent(new Event("change"));
        return document.querySelector(".plot").layout.xaxis.title.text;
    }})()"""


def marks(tab: browser.Browser) -> int:
    """How many points the first figure draws."""
    return int(tab.value("document.querySelector('.plot').querySelectorAll('.scatterlayer .point').length"))


def test_nothing_in_the_page_is_fetched() -> None:
    for tag, attributes in Elements(html.report_page(made.results())).tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:"), f"<{tag} {name}={attributes[name]}>"
    own = page._resource("page.css") + page._resource("page.js") + page._resource("page.html")
    assert not re.search(r"https?:|@import|url\(|fetch\(", own)


def test_the_browser_draws_all_figures_and_complains_of_nothing(opened: browser.Browser) -> None:
    drawn = opened.value(
        "[...document.querySelectorAll('.plot')].map((p) => p.querySelectorAll('.main-svg').length > 0)"
    )
    assert drawn == [True] * 3  # front, taxes, ratios
    assert opened.complaints() == []
    assert [url.rsplit("/", 1)[-1] for url in opened.requests()] == ["report.html"]


@pytest.mark.parametrize(("width", "dark"), [(390, False), (800, True), (1400, False)])
def test_no_word_of_a_figure_is_cut_and_none_lies_on_a_point(
    tab: browser.Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    path = tmp_path / "report.html"
    records.write_whole(path, html.report_page(made.results()))
    assert path.stat().st_size < 2.4e6  # plotly.js alone has 4.8 MB
    tab.open(path, width=width, dark=dark)
    tab.value(menu(1, 1))  # all points, those of validation data
    cut = tab.value("""[...document.querySelectorAll(".plot")].flatMap((place) => {
        const box = place.getBoundingClientRect();
        return [...place.querySelectorAll("text")].filter((text) => {
            const at = text.getBoundingClientRect();
            return at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 || at.bottom > box.bottom + 1;
        }).map((text) => text.textContent);
    })""")
    assert cut == []
    covered = tab.value("""(() => {
        const place = document.querySelector(".plot");
        const points = [...place.querySelectorAll(".scatterlayer .point")].map((p) => p.getBoundingClientRect());
        return [...place.querySelectorAll(".annotation-text, .legendtext")].filter((text) => {
            const at = text.getBoundingClientRect(), inside = (p) => (p.left + p.right) / 2 > at.left &&
                (p.left + p.right) / 2 < at.right && (p.top + p.bottom) / 2 > at.top && (p.top + p.bottom) / 2 < at.bottom;
            return points.some(inside);
        }).map((text) => text.textContent);
    })()""")
    assert covered == []
    assert "90% of the reward gain" in tab.value("document.querySelector('.plot .legend').textContent")


def test_on_paper_figures_are_light_and_what_is_folded_is_open(tab: browser.Browser, tmp_path: Path) -> None:
    records.write_whole(tmp_path / "report.html", html.report_page(made.results()))
    tab.open(tmp_path / "report.html", dark=True)
    state = """(() => {
        const {paper_bgcolor, width} = document.querySelector(".plot").layout;
        return [paper_bgcolor, width ?? null, [...document.querySelectorAll("details")].every((d) => d.open)];
    })()"""
    dark = tab.value(state)
    tab.value("dispatchEvent(new Event('beforeprint'))")
    assert tab.value(state) == ["#ffffff", 680, True]
    tab.value("dispatchEvent(new Event('afterprint'))")
    assert tab.value(state)[:2] == dark[:2] != ["#ffffff", 680]


def test_figures_and_tables_have_names_that_are_read_out() -> None:
    tags = Elements(html.report_page(made.results())).tags
    ids = {a["id"] for _, a in tags if "id" in a}
    figures = [a for _, a in tags if "data-figure" in a]
    assert all(a["role"] == "img" and a["aria-label"] and a["aria-describedby"] in ids for a in figures)
    boxes = [a for _, a in tags if a.get("class") == "scroll"]
    assert all(a["role"] == "region" and a["aria-label"] and a["tabindex"] == "0" for a in boxes)
    assert len(boxes) == sum(tag == "table" for tag, _ in tags) == sum(tag == "caption" for tag, _ in tags) > 5
    assert {a["scope"] for tag, a in tags if tag == "th"} == {"col", "row"}


def test_hovering_names_the_point(opened: browser.Browser) -> None:
    opened.value("document.querySelector('.plot').scrollIntoView()")
    at = opened.value("""(() => {
        const place = document.querySelector(".plot"), {xaxis, yaxis} = place._fullLayout;
        const post = place.data.find((t) => t.name === "POST"), box = place.getBoundingClientRect();
        return [box.left + xaxis._offset + xaxis.d2p(post.x[0]), box.top + yaxis._offset + yaxis.d2p(post.y[0])];
    })()""")
    for shift in (5, 0):
        opened("Input.dispatchMouseEvent", type="mouseMoved", x=at[0] + shift, y=at[1])
        opened.value("new Promise((done) => setTimeout(done, 400))")
    shown = opened.value("document.querySelector('.plot .hoverlayer').textContent")
    assert shown.startswith("POSTreward 0.89")


def test_menus_change_the_axis_and_the_part(opened: browser.Browser) -> None:
    opened.value(menu(1, 1))
    before = marks(opened)
    assert opened.value(menu(0, 1)).startswith("arc_easy: logprob")
    opened.value(menu(1, 0))
    assert 0 < marks(opened) < before  # only four points are measured on held-out data
    opened.value(menu(1, 1))
    assert opened.value(menu(0, 0)) == plots.RETENTION_TITLE
    assert marks(opened) == before


def test_the_figure_opens_on_the_data_of_the_verdict_and_the_other_is_one_click_away(
    tab: browser.Browser, tmp_path: Path
) -> None:
    chosen = "document.querySelectorAll('select')[1].value"
    for results, part in ((made.results(), "held-out"), (made.results() | {"pick": None}, "validation")):
        records.write_whole(tmp_path / "page.html", html.report_page(results))
        tab.open(tmp_path / "page.html", width=1400)
        assert tab.value(chosen) == part
        drawn = marks(tab)
        at = tab.value("""(() => {
            const list = document.querySelectorAll("select")[1];
            list.scrollIntoView({block: "center"});
            const box = list.getBoundingClientRect();
            return [box.left + 20, box.bottom - box.height / 4];
        })()""")
        for kind in ("mousePressed", "mouseReleased"):
            tab("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)
        assert tab.value(chosen) != part
        assert (marks(tab) > drawn) == (part == "held-out")


def test_names_from_outside_stay_text() -> None:
    bad = made.hostile()["verdict"]
    hostile = Elements(html.report_page(made.hostile()))
    assert [tag for tag, _ in hostile.tags if tag in ("script", "img")] == ["script"] * 4
    assert hostile.text.count(bad) >= 8
    in_figures = json.dumps(list(hostile.figures["front"].values()))  # the keys are only looked up
    assert "&lt;img" in in_figures
    assert "<img" not in in_figures


def test_names_from_outside_run_nothing(tab: browser.Browser, tmp_path: Path) -> None:
    records.write_whole(tmp_path / "hostile.html", html.report_page(made.hostile()))
    tab.open(tmp_path / "hostile.html", width=400)
    assert tab.complaints() == []
    assert tab.value("document.querySelectorAll('img').length") == 0
    assert tab.value("document.querySelector('h1').textContent") == made.hostile()["verdict"]
    assert tab.value("document.documentElement.scrollWidth") == 400


@pytest.mark.parametrize("key", WITHOUT)
@pytest.mark.parametrize("how", ["absent", "none"])
def test_a_part_may_be_missing(key: str, how: str) -> None:
    found = made.results()
    if how == "absent":
        del found[key]
    else:
        found[key] = None
    page = Elements(html.report_page(found))
    expected = {"front", "taxes", "ratios"} - ({"taxes"} if key == "tax" else set())
    expected -= {"front", "ratios"} if key == "points" else set()
    assert set(page.figures) == expected
    assert [a["data-figure"] for _, a in page.tags if "data-figure" in a] == sorted(
        expected, key=["front", "taxes", "ratios"].index
    )


def test_a_run_that_stopped_and_one_of_nothing() -> None:
    assert set(Elements(html.report_page(made.stopped())).figures) == {"front", "taxes"}
    assert set(Elements(html.report_page(made.without_hma())).figures) == {"front", "taxes", "ratios"}
    assert "No verdict was recorded." in html.report_page({})


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_values_that_are_no_numbers(value: float | None) -> None:
    found = made.results()
    nothing = {"value": value, "low": value, "high": value}
    hma = next(p for p in found["points"] if p["name"] == "HMA 0.6")
    hma["reward"] = hma["abilities"]["piqa"]["logprob"] = nothing
    found["points"][0]["retention"] = nothing
    found["points"][2]["abilities"] = {}
    found["tax"][1]["pre"] = found["tax"][3]["tax"] = {**nothing, "p": value}
    found["hypervolume"]["MA"] = value
    page = Elements(html.report_page(found))
    names = [t["name"] for t in page.figures["front"]["retention|validation"]["data"]]
    assert {"PRE", "POST"} & set(names) == {"POST"}
    rows = page.figures["taxes"][""]["layout"]["yaxis"]["ticktext"]
    assert rows == ["multi30k", "lambada", "arc_easy"]  # piqa's tax is not known


def test_results_are_only_read() -> None:
    found = made.results()
    before = copy.deepcopy(found)
    html.report_page(found)
    assert found == before


def test_the_front_refuses_an_axis_it_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"expected an axis among retention, arc_easy.*found 'mmlu'"):
        plots.plot_front(made.results(), "mmlu")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    records.write_whole(path, "old")

    def broken(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="disk full"):
            records.write_whole(path, "new")
    with pytest.raises(UnicodeEncodeError):
        records.write_whole(path, "half of it \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    records.write_whole(path, "new\n")
    assert path.read_bytes() == b"new\n"
