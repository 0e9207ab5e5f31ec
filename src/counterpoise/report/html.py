"""report.html: the page of a run of restore."""

from __future__ import annotations

import html
import json
from functools import partial

from counterpoise.report import plots
from counterpoise.report.page import Figures, fact_list, glossary, headed, header, page, plot_box, run_section, section
from counterpoise.tables import reading, shifts, tables, taxes
from counterpoise.tables.grid import Table, as_html
from counterpoise.tables.logs import calibrations
from counterpoise.tables.numbers import number, ratio_list
from counterpoise.tables.reading import Results

_CAPTION = (
    f"Up is more reward, right is more ability kept. {tables.RETENTION_TOLD} Bars are 95 % intervals of each point alone; "
    "all points were scored on the same items, so two points can differ for certain although their bars overlap. Faded "
    "points are beaten by another in both directions."
)
_GLOSSARY = {
    "Ratio": "The share of the alignment update that is kept: pre + ratio × (post − pre). 0 is PRE, 1 is POST. A block is "
    "a set of tensors that share one.",
    "MA and HMA": "MA averages all blocks alike. HMA gives each block its own ratio at the same mean, searched for the reward "
    "alone. LiNeS grows with depth, slope 2 and step more steeply. Reversed and random ratios are controls: if they do as "
    "well, the search bought nothing.",
    "Two-sided": "Gives each block the ratio at which alignment lost plus lambda times what PRE says and POST forgot is least, "
    "with no fixed mean: from a model of both sides (path), then on the sides themselves (exact).",
    "Healed": "Trained for a few steps on answers of its own, with POST as the teacher where alignment is asked and PRE where "
    "abilities are: no average, and no label was read.",
    "Tax": "PRE's score minus POST's. Every score is oriented so that higher is better; log-likelihoods are negated losses.",
    "Distance": "What training for one thing changed in what the model says, measured before any ability: small distances "
    "have been found to go with little forgetting (arXiv 2509.04259). KL is the Kullback-Leibler divergence.",
    "Changed sides": "The tax is a difference of means. As many items may have been lost as were learned; two models that "
    "only guess swap items too, and that share is taken off (arXiv 2510.17776).",
    "Retention": f"{tables.RETENTION_TOLD} A change of less than two standard errors counts as that share of them. Abilities "
    "at floor are left out.",
    "Likelihood and accuracy": "Two measures of one ability: how probable right answers are, and whether the answers are right. "
    "The first row of an ability is the one that counts for the mean, the front and the pick (?primary=).",
    "Front": "The points that no other beats in both reward and retention.",
    "Validation and held-out": "Prompts and items are split by content. Ratios are searched on the proxy part, the pick is "
    "made on validation, and the tax table is measured on held-out data that decided nothing.",
    "Intervals": "Bootstrap over prompts and items. They say nothing of another seed of the training or of sampling.",
}


def report_page(results: Results) -> str:
    """The page of one run from the content of restore.json; absent parts are left out."""
    figures: Figures = {}
    sections = [
        _distance_section(results),
        _front_section(results, figures),
        _tax_section(results, figures),
        _table_section("Answers that changed sides", shifts.flips(results)),
        _table_section("How sure, and how often right", calibrations(results)),
        _ratio_section(results, figures),
        _table_section("The search", tables.search_table(results)),
        _two_sided_section(results, figures),
        _healing_section(results),
        _table_section("What each candidate of the race cost", tables.race_table(results)),
        _table_section("Everything that was measured", tables.measured(results)),
        _run_section(results),
        glossary(_GLOSSARY),
    ]
    title = " and ".join(filter(None, (_source(results, "pre"), _source(results, "post")))) or "report"
    return page(f"counterpoise: {title}", _header(results) + "".join(sections), figures)


def _header(results: Results) -> str:
    pick = reading.picked(results)
    facts = {
        "PRE": _source(results, "pre"),
        "POST": _source(results, "post"),
        "Reward": results.get("reward"),
        "The pick": f"{pick['name']}{_ratios(pick)}" if pick else "none",
        "Written to": results.get("out"),
        "Date": results.get("date"),
    }
    warnings = "".join(f"<li>{html.escape(str(w))}</li>" for w in results.get("warnings") or ())
    return header(
        "what alignment cost, and what averaging gives back",
        str(results.get("verdict") or "No verdict was recorded."),
        fact_list(facts) + (f"<div class=warnings><ul>{warnings}</ul></div>" if warnings else ""),
    )


def _ratios(pick: reading.PointEntry) -> str:
    return f": ratios {ratio_list(pick['ratios'])}" if pick["ratios"] else ""


def _distance_section(results: Results) -> str:
    table = shifts.distances(results)
    lead = f"<p class=lead>{html.escape(shifts.likelier(results))}</p>"
    return section("How far it has gone from PRE", lead + as_html(table, "Distances from PRE")) if table else ""


def _front_section(results: Results, figures: Figures) -> str:
    axes, parts = reading.axes(results), reading.parts(results)
    if not axes or not parts:
        return ""
    parts = parts[::-1] if reading.picked(results) else parts  # first the data that the verdict speaks of
    menus = {
        "horizontal axis:": {a: reading.axis_label(results, a, "retention, all abilities") for a in axes},
        "measured on:": {part: f"{part} data" for part in parts},
    }
    draw = partial(plots.plot_front, results)
    title = "Reward against abilities"
    return section(title, plot_box(figures, "front", f"{title} kept", draw, _CAPTION, menus))


def _tax_section(results: Results, figures: Figures) -> str:
    table = taxes.ability_taxes(results)
    if not table:
        return ""
    caption = (
        "Each ability by the metric that counts, on held-out data, with 95 % intervals. Right of 0 is lost. 1 is all that POST "
        "lost, or two standard errors of that where it is less."
    )
    content = as_html(table, "Tax by ability") + headed("By likelihood and by accuracy", taxes.both_kinds(results))
    if (figure := plots.plot_taxes(results)).data:
        box = plot_box(figures, "taxes", "Tax by ability", lambda: figure, caption, low=True)
        content += f"<h3>The same, on one scale</h3>{box}"
    content += headed("The pick against plain averaging", taxes.against_ma(results))
    return section("The tax, ability by ability", content)


def _ratio_section(results: Results, figures: Figures) -> str:
    table = tables.pick_ratios(results)
    if not table and not any(p["method"] == "HMA" for p in reading.measured_points(results)):
        return ""
    title = "Ratio of each layer"
    caption = "1 keeps all of the alignment update in a layer, 0 gives the layer back to PRE."
    box = plot_box(figures, "ratios", title, lambda: plots.plot_ratios(results), caption, low=True)
    return section(title, box + (as_html(table, title) if table else ""))


def _two_sided_section(results: Results, figures: Figures) -> str:
    table = tables.two_sided_table(results)
    if not table:
        return ""
    how = "exact" if any(row["how"] == "exact" for row in table.rows) else "path"
    caption = (
        "1 keeps all of the alignment update in a layer, 0 gives the layer back to PRE. Stronger lines: larger lambda, more of "
        f"PRE asked for. What stands outside the layers has a ratio of its own, in the table. Shown: {how}."
    )
    draw = partial(plots.plot_two_sided, results, how)
    box = plot_box(figures, "two-sided", "Ratios of the two-sided search", draw, caption, low=True)
    return section("The two-sided search", box + as_html(table, "The two-sided search"))


def _healing_section(results: Results) -> str:
    told, table = tables.healing_told(results), tables.healing_table(results)
    return section("Healing", f"<p>{html.escape(told)}</p>{as_html(table, 'Points of the healing')}") if told else ""


def _table_section(title: str, table: Table) -> str:
    return section(title, as_html(table, title)) if table else ""


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
    folded = {"Settings": fact_list(settings), "Input files": as_html(hashes, "Input files") if hashes else ""}
    return run_section(results.get("command"), facts, folded)


def _source(results: Results, side: str) -> str | None:
    found = ((results.get("inputs") or {}).get(side) or {}).get("source")
    return None if found is None else str(found)
