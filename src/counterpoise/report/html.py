"""report.html: the page of a run of restore."""

from __future__ import annotations

import html
import json
from pathlib import Path

from counterpoise.records import write_whole
from counterpoise.report import plots
from counterpoise.report.page import (
    Figures,
    fact_list,
    glossary,
    header,
    menu,
    page,
    plot_box,
    run_section,
    section,
    spec,
    specs,
)
from counterpoise.report.two_sided import two_sided_section
from counterpoise.tables import reading, tables
from counterpoise.tables.grid import Table, as_html
from counterpoise.tables.numbers import number, ratio_list
from counterpoise.tables.reading import Results

_CAPTION = (
    "Up is more reward, right is more ability kept. Bars are 95 % intervals of each point alone; all points were scored "
    "on the same items, so two points can differ for certain although their bars overlap. Faded points are beaten by "
    "another in both directions."
)
_GLOSSARY = {
    "Ratio": "The share of the alignment update that is kept: pre + ratio × (post − pre). 0 is PRE, 1 is POST. A block is "
    "a set of tensors that share one.",
    "MA and HMA": "MA averages all blocks alike. HMA gives each block its own ratio at the same mean, searched for the reward "
    "alone. LiNeS grows with depth. Reversed and random ratios are controls: if they do as well, the search bought nothing.",
    "Two-sided": "Gives each block the ratio at which alignment lost plus lambda times what PRE says and POST forgot is least, "
    "with no fixed mean: from a model of both sides (path), then on the sides themselves (exact).",
    "Tax": "PRE's score minus POST's. Every score is oriented so that higher is better; log-likelihoods are negated losses.",
    "Retention": "Minus the mean over abilities of the tax, each divided by its standard error at PRE. 0 is PRE; −2 means "
    "two standard errors lost on average. Abilities at floor are left out.",
    "Front": "The points that no other beats in both reward and retention.",
    "Validation and held-out": "Prompts and items are split by content. Ratios are searched on the proxy part, the pick is "
    "made on validation, and the tax table is measured on held-out data that decided nothing.",
    "Intervals": "Bootstrap over prompts and items. They say nothing of another seed of the training or of sampling.",
}


def write_report(results: Results, path: str | Path) -> None:
    """Write the page of one run; the file appears whole or not at all.

    Args:
        results: the content of restore.json; absent parts are left out of the page.
        path: the file to write; one that is there is replaced.
    """
    write_whole(Path(path), report_page(results))


def report_page(results: Results) -> str:
    """The page of one run, as text."""
    figures: Figures = {}
    sections = [
        _front_section(results, figures),
        _tax_section(results, figures),
        _ratio_section(results, figures),
        _search_section(results, figures),
        two_sided_section(results, figures),
        _table_section("Hypervolume", tables.volume_table(results)),
        _table_section("Everything that was measured", tables.measured(results)),
        _run_section(results),
        glossary(_GLOSSARY),
    ]
    return page(f"counterpoise: {_title(results)}", _header(results) + "".join(sections), figures)


def _header(results: Results) -> str:
    pick = reading.picked(results)
    facts = {
        "PRE": _source(results, "pre"),
        "POST": _source(results, "post"),
        "Reward": results.get("reward"),
        "The pick": f"{pick['name']}: ratios {ratio_list(pick['ratios'])}" if pick else "none",
        "Written to": results.get("out"),
        "Date": results.get("date"),
    }
    warnings = "".join(f"<li>{html.escape(str(w))}</li>" for w in results.get("warnings") or ())
    return header(
        "what alignment cost, and what averaging gives back",
        str(results.get("verdict") or "No verdict was recorded."),
        fact_list(facts) + (f"<div class=warnings><ul>{warnings}</ul></div>" if warnings else ""),
    )


def _front_section(results: Results, figures: Figures) -> str:
    shown = {
        f"{axis}|{part}": plots.plot_front(results, axis, part=part)
        for axis in reading.axes(results)
        for part in reading.parts(results)
    }
    if not shown:
        return ""
    figures["front"] = specs(shown)
    menus = [
        menu(
            "horizontal axis:",
            {a: reading.axis_label(results, a, "retention, all abilities") for a in reading.axes(results)},
        ),
        menu("measured on:", {part: f"{part} data" for part in reading.parts(results)}),
    ]
    return section("Reward against abilities", plot_box("front", "Reward against abilities kept", menus, _CAPTION))


def _tax_section(results: Results, figures: Figures) -> str:
    table = tables.ability_taxes(results)
    if not table:
        return ""
    caption = (
        "Each ability by its first metric, on held-out data, with 95 % intervals. Right of 0 is lost. One unit is the "
        "standard error of PRE's score."
    )
    scale = ""
    if (figure := plots.plot_taxes(results)).data:
        figures["taxes"] = {"": spec(figure)}
        scale = "<h3>The same, on one scale</h3>" + plot_box("taxes", "Tax by ability", [], caption, low=True)
    against = tables.against_ma(results)
    beside = f"<h3>The pick against plain averaging</h3>{as_html(against)}" if against else ""
    return section("The tax, ability by ability", as_html(table) + scale + beside)


def _ratio_section(results: Results, figures: Figures) -> str:
    table = tables.pick_ratios(results)
    drawn = [p for p in reading.measured_points(results) if p["method"] == "HMA"]
    if not table and not drawn:
        return ""
    figures["ratios"] = {"": spec(plots.plot_ratios(results))}
    caption = "1 keeps all of the alignment update in a layer, 0 gives the layer back to PRE."
    return section(
        "Ratio of each layer",
        plot_box("ratios", "Ratio of each layer", [], caption, low=True) + (as_html(table) if table else ""),
    )


def _search_section(results: Results, figures: Figures) -> str:
    table = tables.search_table(results)
    if not table:
        return ""
    if not (figure := plots.plot_searches(results)).data:
        return section("The search", as_html(table))
    figures["searches"] = {"": spec(figure)}
    caption = "The first pass is MA, all ratios equal. How far a line falls is what HMA gained on the proxy responses."
    return section("The search", plot_box("searches", "Search traces", [], caption, low=True) + as_html(table))


def _table_section(title: str, table: Table) -> str:
    return section(title, as_html(table)) if table else ""


def _run_section(results: Results) -> str:
    cut = results.get("partition") or {}
    seconds = results.get("seconds")
    facts = {
        "Abilities": ", ".join(map(str, results.get("abilities") or ())) or None,
        "Prompts": results.get("prompts"),
        "Partition": f"{cut.get('name')}, {len(cut.get('blocks') or ())} blocks" if cut else None,
        "Seed": results.get("seed"),
        "Commit": results.get("commit"),
        "Took": None if seconds is None else f"{number(seconds / 60, 1)} minutes",
        "Versions": reading.version_list(results) or None,
    }
    settings = {str(k): json.dumps(v, ensure_ascii=False) for k, v in (results.get("settings") or {}).items()}
    hashes = tables.files(results)
    folded = {"Settings": fact_list(settings), "Input files": as_html(hashes) if hashes else ""}
    return run_section(results.get("command"), facts, folded)


def _source(results: Results, side: str) -> str | None:
    found = ((results.get("inputs") or {}).get(side) or {}).get("source")
    return None if found is None else str(found)


def _title(results: Results) -> str:
    return " and ".join(filter(None, (_source(results, "pre"), _source(results, "post")))) or "report"
