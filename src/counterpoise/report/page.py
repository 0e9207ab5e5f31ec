"""A self-contained page: it holds all it needs, opens from disk and asks the network for nothing."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from itertools import product
from string import Template
from typing import Any

from counterpoise.report import palette
from counterpoise.tables.grid import Table, as_html

Figures = dict[str, dict[str, Any]]
"""What the json of plotly figures holds, by the place they are drawn in and by what is chosen in its menus."""


@cache
def plotly_script() -> tuple[str, str]:
    """plotly.js as the page holds it, gzipped and in base64, and the hash by which the page's policy knows it."""
    from plotly.offline import get_plotlyjs

    text = str(get_plotlyjs()).encode()
    return base64.b64encode(gzip.compress(text, mtime=0)).decode(), _hash(text)


def page(title: str, body: str, figures: Figures) -> str:
    """A page around a body and its figures, with scripts, style and data inside."""
    (plotly, known), script = plotly_script() if figures else ("", ""), _resource("page.js")
    return Template(_resource("page.html")).substitute(
        title=html.escape(title),
        # The browser itself then refuses every request and every script but these two.
        policy=f"default-src 'none'; script-src {known} {_hash(script.encode())}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'",
        light=palette.css(dark=False),
        dark=palette.css(dark=True),
        style=_resource("page.css"),
        body=body,
        figures=_json(figures),
        swaps=_json(palette.dark_of()),
        plotly=plotly,
        script=script,
    )


def headed(title: str, table: Table) -> str:
    """A table under a smaller heading; "" where it has no rows."""
    return f"<h3>{html.escape(title)}</h3>{as_html(table, title)}" if table else ""


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


def plot_box(
    figures: Figures,
    name: str,
    label: str,
    draw: Callable[..., Any],
    caption: str,
    menus: Mapping[str, Mapping[str, str]] | None = None,
    *,
    low: bool = False,
) -> str:
    """The place where one of some plotly figures is drawn, under the menus that choose among them.

    Args:
        figures: those of the whole page, to which these are added.
        draw: makes the figure of one option of each menu, in their order.
        menus: title -> option -> what is read; the first option is chosen.
    """
    menus = menus or {}
    figures[name] = {"|".join(chosen): json.loads(draw(*chosen).to_json()) for chosen in product(*menus.values())}
    controls = "".join(_menu(title, options) for title, options in menus.items())
    controls = f"<div class=controls>{controls}</div>" if menus else ""
    size = " low" if low else ""
    return (
        f'<figure>{controls}<div class="plot{size}" data-figure="{name}" role="img" aria-label="{html.escape(label)}" '
        f'aria-describedby="about-{name}"></div><figcaption id="about-{name}">{html.escape(caption)}</figcaption></figure>'
    )


def fact_list(facts: Mapping[str, Any]) -> str:
    """Names and values; a value of None is left out."""
    rows = "".join(
        f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items() if v is not None
    )
    return f"<dl>{rows}</dl>" if rows else ""


def _menu(title: str, options: Mapping[str, str]) -> str:
    shown = "".join(f'<option value="{html.escape(v)}">{html.escape(t)}</option>' for v, t in options.items())
    shown, size = shown.replace("<option", "<option selected", 1), " size=2" if len(options) == 2 else ""
    return f"<label>{html.escape(title)} <select{size}>{shown}</select></label>"  # of two, both are one click away


def _json(content: Any) -> str:
    """Json that cannot end the script element around it."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(script: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"


def _resource(name: str) -> str:
    return files("counterpoise.report").joinpath(name).read_text(encoding="utf-8")
