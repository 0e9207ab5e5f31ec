"""What the commands share: errors as one message, progress bars on stderr. Nothing heavy is imported here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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
