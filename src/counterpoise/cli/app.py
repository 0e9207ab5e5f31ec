"""The command line: parse, call, print. Everything heavy is imported inside a command, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from counterpoise.cli.align import app as align
from counterpoise.cli.average import average, diff
from counterpoise.cli.front import front
from counterpoise.cli.judge import app as judge
from counterpoise.cli.merge import merge
from counterpoise.cli.multitask import app as multitask
from counterpoise.cli.options import (
    Quiet,
    Seed,
)
from counterpoise.cli.restore import restore, tax
from counterpoise.cli.search import search
from counterpoise.cli.terminal import bars, commands, plain_errors, show_result

app = commands(
    "counterpoise",
    "Keep a model good at everything at once: average the weights before and after alignment, or balance many tasks.",
)
for first in (restore, average, tax, diff):
    app.command()(first)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("counterpoise-demo"),
    seed: Seed = 0,
    open_page: Annotated[bool, typer.Option("--open", help="Open the report in a browser at the end.")] = False,
    quiet: Quiet = False,
) -> None:
    """The whole story from nothing, offline, in about two minutes: train, align, measure the tax, give it back."""
    with plain_errors("nothing was kept"), bars(quiet) as progress:
        from counterpoise.demo import run_demo

        result = run_demo(out, seed=seed, progress=progress)
    show_result(result["restore"], out / "restored", None)
    if open_page:
        import webbrowser

        webbrowser.open((out / "restored" / "report.html").absolute().as_uri())


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as of

    print(of("counterpoise"))


app.add_typer(align)
app.add_typer(multitask)
app.add_typer(judge)
for later in (search, merge, front):
    app.command()(later)


def main() -> None:
    """Entry point of the `counterpoise` command."""
    app()
