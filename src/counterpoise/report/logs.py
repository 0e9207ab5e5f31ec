"""The page of `counterpoise tax --from`: two finished runs, task by task."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from counterpoise.report.page import fact_list, glossary, header, page, run_section, section
from counterpoise.tables.grid import as_html
from counterpoise.tables.logs import calibrations, taxes

_GLOSSARY = {
    "Tax": "PRE's score minus POST's on the same items, found by their content. Losses and error rates are negated, so that "
    "higher is better in every row.",
    "Groups": "The mean of a group's tasks with the weights that give lm-eval's own number; items are resampled within tasks.",
    "p and Holm": "McNemar's exact test where a task's items are right or wrong, else the paired bootstrap. Holm's adjustment "
    "bounds the chance of any wrong call: over the first metric of all tasks, over their likelihoods, over all further "
    "metrics, and over groups.",
    "Lost and won": "Shares of the items that went from right to wrong and from wrong to right, in percent. A mean that stands "
    "still can hide both.",
    "Calibration": "How far the probabilities that the choices' log-likelihoods give are from how often they are right.",
    "Intervals": "95 %, over items. They say nothing of another seed of the training or of sampling.",
}


def logs_page(result: Mapping[str, Any]) -> str:
    """The page from what `counterpoise.evaluation.log_tax.compare` made; it needs no figures and asks for nothing."""
    sides = {side.upper(): result[side]["source"] for side in ("pre", "post")}
    notes = "".join(f"<li>{html.escape(str(note))}</li>" for note in result["notes"])
    told = fact_list(sides) + (f"<div class=warnings><ul>{notes}</ul></div>" if notes else "")
    body = header("the tax of two finished runs", str(result["verdict"]), told)
    body += section("The tax, task by task", as_html(taxes(result), "Tax by task"))
    if calibrated := calibrations(result):
        body += section("Calibration", as_html(calibrated, "Calibration"))
    body += run_section(result.get("command"), {}, {}) + glossary(_GLOSSARY)
    return page(f"counterpoise: {sides['PRE']} and {sides['POST']}", body, {})
