"""`counterpoise tax --from`: heavy imports inside the function."""

from __future__ import annotations

from pathlib import Path

import typer

from counterpoise.cli.terminal import command_line, print_json

_TAKEN = ("pre", "post", "from_logs", "page", "as_json", "quiet")


def tax_of_logs(ctx: typer.Context, pre: str, post: str, page: Path | None, *, as_json: bool) -> None:
    """Compare two finished runs, print the table, and write what was asked for.

    Raises:
        ValueError: an option was typed that only the measuring of models knows.
    """
    for option in ctx.command.params:
        source = ctx.get_parameter_source(str(option.name))
        if option.name not in _TAKEN and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"{option.opts[0]}: does nothing with --from, which measures no model; leave it out")
    from rich.console import Console

    from counterpoise.evaluation.log_tax import compare
    from counterpoise.evaluation.logs import read_log
    from counterpoise.records import write_whole
    from counterpoise.tables.grid import as_rich
    from counterpoise.tables.logs import brief_taxes, calibrations

    result = {"command": command_line(), **compare(read_log(pre), read_log(post, "POST"))}
    if page:
        from counterpoise.report.logs import logs_page

        write_whole(page, logs_page(result))
    if as_json:
        print_json(result)
        return
    console = Console()
    for table in filter(None, (brief_taxes(result), calibrations(result))):
        console.print(as_rich(table))
    for note in result["notes"]:
        print(f"note: {note}")
    print(result["verdict"])
    if page:
        print(f"wrote {page}")
