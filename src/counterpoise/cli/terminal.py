"""What the commands share: errors as one message, progress bars on stderr. Nothing heavy is imported here."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer


def commands(name: str, help: str, **more: Any) -> typer.Typer:
    """An empty group of commands."""
    plain: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
    return typer.Typer(name=name, help=help, **plain, **more)


@contextmanager
def plain_errors(kept: str, *more: type[Exception]) -> Iterator[None]:
    """Errors that a user can act on become one message; anything else keeps its traceback.

    Args:
        kept: what is left when the command is stopped, for the message.
        more: further kinds of error that this command's users can act on.
    """
    told: tuple[type[Exception], ...] = (ValueError, OSError, ModuleNotFoundError, *more)
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; {kept}", file=sys.stderr)
        raise SystemExit(130) from None
    except told as error:
        print(f"error: {_said(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def _said(error: Exception) -> str:
    """The message alone: what Python itself says of a lost file or key tells no stranger what to do."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: expected a file or folder, found nothing of that name; check the path"
    return str(error.args[0] if isinstance(error, KeyError) else error)


@contextmanager
def bars(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Progress bars on stderr, one a stage; finished ones stay as a line."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield advance


def warn(warnings: Sequence[str]) -> None:
    """Warnings on stderr, a line each."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def show_result(result: dict[str, Any], out: Path, work: Path | None) -> None:
    """What a finished restore found and where it lies."""
    warn(result["warnings"])
    show_tax(result)
    if result.get("already_finished"):
        print(f"{out} holds the result of this very run already; nothing was done again.")
    print(result["verdict"])
    place = out if result.get("out") else work or out.with_name(out.name + ".work")
    print(f"report: {place / 'report.html'}")
    if result.get("out"):
        print(f"checkpoint: {out}")


def show_tax(result: dict[str, Any]) -> None:
    """The table of the tax."""
    from rich.console import Console

    from counterpoise.tables.tables import tax_rich

    Console().print(tax_rich(result))


def command_line() -> str:
    """What was typed, as a shell takes it."""
    return shlex.join(["counterpoise", *sys.argv[1:]])
