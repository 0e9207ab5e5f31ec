"""A self-contained page: it holds all it needs, opens from disk and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from counterpoise.report import palette, plots

Figures = dict[str, dict[str, Any]]
"""Plotly figures by the place they are drawn in and by what is chosen in that place's menus, joined by |."""


def page(title: str, body: str, figures: Figures) -> str:
    """A page around a body and its figures, with scripts, style and data inside."""
    plotly, script = plots.plotly_script().replace("\r", ""), _resource("page.js")
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in (plotly, script))
    return Template(_resource("page.html")).substitute(
        title=html.escape(title),
        # The browser itself then refuses every request and every script but these two.
        policy=f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'",
        light=palette.css(dark=False),
        dark=palette.css(dark=True),
        style=_resource("page.css"),
        body=body,
        figures=_json(figures),
        swaps=_json(palette.dark_of()),
        plotly=plotly,
        script=script,
    )


def section(title: str, content: str) -> str:
    """A headed part of a page; the content is html."""
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>\n"


def header(eyebrow: str, title: str, content: str = "") -> str:
    """The head of a page; the content is html."""
    return f"<header><p class=eyebrow>counterpoise · {eyebrow}</p><h1>{html.escape(title)}</h1>{content}</header>"


def run_section(command: Any, facts: Mapping[str, Any], folded: Mapping[str, str]) -> str:
    """What was run: the command, facts, and html that is folded away under its name; what is empty is left out."""
    typed = f"<pre>{html.escape(str(command))}</pre>" if command else ""
    more = "".join(f"<details><summary>{k}</summary>{inside}</details>" for k, inside in folded.items() if inside)
    return section("What was run", typed + fact_list(facts) + more)


def glossary(entries: Mapping[str, str]) -> str:
    """The section that explains a page's words."""
    told = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in entries.items())
    return section("How to read this", f"<dl class=columns>{told}</dl>")


def plot_box(name: str, label: str, menus: Sequence[str], caption: str, *, low: bool = False) -> str:
    """The place where the figures of that name are drawn, under the menus that choose among them."""
    controls = f"<div class=controls>{''.join(menus)}</div>" if menus else ""
    size = " low" if low else ""
    return (
        f'<figure>{controls}<div class="plot{size}" data-figure="{name}" role="img" aria-label="{html.escape(label)}"></div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def menu(label: str, options: Mapping[str, str]) -> str:
    """A menu from the keys of figures to what is read; the first is chosen."""
    chosen = "".join(f'<option value="{html.escape(v)}">{html.escape(t)}</option>' for v, t in options.items())
    return f"<label>{html.escape(label)} <select>{chosen}</select></label>"


def fact_list(facts: Mapping[str, Any]) -> str:
    """Names and values; a value of None is left out."""
    rows = "".join(
        f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items() if v is not None
    )
    return f"<dl>{rows}</dl>" if rows else ""


def specs(figures: Mapping[str, Any]) -> dict[str, Any]:
    """`spec` of each figure."""
    return {key: spec(figure) for key, figure in figures.items()}


def spec(figure: Any) -> Any:
    """A plotly figure as what its json holds."""
    return json.loads(figure.to_json())


def _json(content: Any) -> str:
    """Json that cannot end the script element around it."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _resource(name: str) -> str:
    return files("counterpoise.report").joinpath(name).read_text(encoding="utf-8")
