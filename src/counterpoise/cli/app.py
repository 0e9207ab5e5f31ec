"""The command line: parse, call, print. Everything heavy is imported inside a command, so that --help is quick."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from counterpoise.cli.align import app as align
from counterpoise.cli.average import average, diff
from counterpoise.cli.front import front
from counterpoise.cli.heal import heal
from counterpoise.cli.help import Commands, Version, option
from counterpoise.cli.judge import app as judge
from counterpoise.cli.merge import merge
from counterpoise.cli.multitask import app as multitask
from counterpoise.cli.options import AsJson, Quiet, Seed
from counterpoise.cli.recipe import app as recipe
from counterpoise.cli.restore import restore, tax
from counterpoise.cli.search import search
from counterpoise.cli.terminal import bars, plain_errors, refuse_several, show_result

app = Commands(
    "counterpoise",
    "Keep a model good at everything at once: average the weights before and after alignment, or balance many tasks.",
    add_completion=True,
)


SHARING = ("restore", "tax", "search", "heal", "align")
"""Commands that share their work where torchrun starts several processes."""


@app.callback()
def start(ctx: typer.Context, version: Version = False) -> None:
    if ctx.invoked_subcommand and ctx.invoked_subcommand not in SHARING:
        with plain_errors("nothing was begun"):
            refuse_several(ctx.invoked_subcommand)


for first in (restore, heal, average, tax, diff):
    app.command()(first)


@app.command()
def demo(
    out: Annotated[Path, option("FOLDER", "Folder to write.", "-o", "--out")] = Path("counterpoise-demo"),
    seed: Seed = 0,
    open_page: Annotated[bool, option(None, "Open the report in a browser at the end.", "--open")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The whole story from nothing, offline, in about two minutes: train, align, measure the tax, give it back.

    Example:
      counterpoise demo --open
    """
    with plain_errors("nothing was kept"), bars(quiet) as progress:
        from counterpoise.demo import run_demo

        result = run_demo(out, seed=seed, progress=progress)
    show_result(result["restore"], out / "restored", None, as_json=as_json)
    if open_page:
        import webbrowser

        webbrowser.open((out / "restored" / "report.html").absolute().as_uri())


app.add_typer(align)
app.add_typer(multitask)
app.add_typer(judge)
for later in (search, merge, front):
    app.command()(later)
app.add_typer(recipe)


def main() -> None:
    """Entry point of the `counterpoise` command."""
    if not sys.stderr.isatty() or {"-q", "--quiet"} & {*sys.argv}:
        for library in ("HF_HUB", "HF_DATASETS"):  # transformers asks the hub's
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without the line of code it came from
    app()
