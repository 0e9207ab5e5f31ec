"""`counterpoise front`: heavy imports inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from counterpoise.cli.help import option
from counterpoise.cli.options import Quiet
from counterpoise.cli.terminal import plain_errors


def front(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULT...", help="Result files: restore.json, or any json with points.")
    ],
    out: Annotated[Path, option("FILE", "Page to write; one that is there is replaced.", "-o", "--out")] = Path(
        "front.html"
    ),
    open_page: Annotated[bool, option(None, "Open the page in a browser at the end.", "--open")] = False,
    quiet: Quiet = False,
) -> None:
    """Draw any set of result files on one page: reward against every ability, one colour a method.

    Example:
      counterpoise front seed-0/restore.json seed-1/restore.json --open
    """
    with plain_errors("nothing was written"):
        from counterpoise.records import write_whole
        from counterpoise.report.comparisons import read_comparisons
        from counterpoise.report.fronts import fronts_page

        comparisons = read_comparisons(results)
        write_whole(out, fronts_page(comparisons))
    for comparison in comparisons:
        print(f"{comparison.reward or 'unnamed reward'}: {', '.join(g.name for g in comparison.groups)}")
        for note in comparison.notes:
            print(f"  {note}")
    print(f"wrote {out}")
    if open_page:
        import webbrowser

        webbrowser.open(out.absolute().as_uri())
