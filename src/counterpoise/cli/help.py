"""What `--help` shows: options in named groups, none cut at any width, and an example at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from counterpoise.cli import terminal

F = TypeVar("F", bound=Callable[..., Any])
EXAMPLE = "\n\nExample:\n"
RUN = "Run"


def group(name: str | None) -> Callable[..., Any]:
    """An option of a named group: `measured("N", "Help.", "--name", min=1)`."""

    def made(metavar: str | None, text: str, *names: str, **more: Any) -> Any:
        return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=name, **more)

    return made


option, measured, searched, drawn = map(group, (None, "What is measured", "Search and pick", "Responses"))
matched, machine, general = map(group, ("Checkpoints", "Machine", RUN))
"""Groups that several commands have; `option` is the one without a name."""


def spread(function: F) -> F:
    """The function with each parameter that is a dataclass of options replaced by those options, as Typer wants them."""
    flat: list[Parameter] = []
    groups: dict[str, Any] = {}
    for param in signature(function, eval_str=True).parameters.values():
        kind: Any = param.annotation
        if is_dataclass(kind):
            groups[param.name], told = kind, get_type_hints(kind, include_extras=True)
            flat += [param.replace(name=f.name, default=f.default, annotation=told[f.name]) for f in fields(kind)]
        else:
            flat.append(param)

    @wraps(function)
    def run(**typed: Any) -> Any:
        held = {name: kind(**{f.name: typed.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        return function(**typed, **held)

    run.__signature__ = signature(function).replace(parameters=flat)  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


class Command(TyperCommand):
    """A command whose docstring ends in an example, which is shown as it stands."""

    def __init__(self, *args: Any, help: str | None = None, **more: Any) -> None:
        help, _, example = (help or "").partition(EXAMPLE)
        super().__init__(*args, help=help, **(more | {"epilog": example or None}))

    def invoke(self, ctx: Any) -> Any:
        """Run it; with -q nothing is said beside the result."""
        terminal.aloud = not ctx.params.get("quiet")
        return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Without the braces that newer versions of Typer put around arguments."""
        return [piece.translate({ord("{"): None, ord("}"): None}) for piece in super().collect_usage_pieces(ctx)]

    def get_short_help_str(self, limit: int = 0) -> str:
        """The whole first sentence in the list of commands."""
        return super().get_short_help_str(1000)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """One list a group, in the order in which they are declared; what is in no group comes first."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                kind = "Arguments" if param.param_type_name == "argument" else "Options"
                if kind == "Arguments":
                    record = (param.metavar or param.name, record[1])
                ours = RUN if record[0] == "--help" else getattr(param, "rich_help_panel", None)
                groups.setdefault(ours or kind, []).append(record)
        groups[RUN] = groups.pop(RUN)
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The example, line by line."""
        if self.epilog:
            formatter.write(f"\nExample:\n{self.epilog.rstrip()}\n")


class Group(TyperGroup):
    """A group whose whole first sentence stands in the list of commands."""

    def get_short_help_str(self, limit: int = 0) -> str:
        """As that of a command."""
        return super().get_short_help_str(1000)


class Commands(typer.Typer):
    """A group of such commands."""

    def __init__(self, name: str, help: str, **more: Any) -> None:
        plain: dict[str, Any] = {"rich_markup_mode": None, "no_args_is_help": True, "add_completion": False}
        plain["pretty_exceptions_enable"] = False
        super().__init__(name=name, help=help, **({"cls": Group} | plain | more))

    def command(self, name: str | None = None, **more: Any) -> Callable[[F], F]:
        """As Typer's."""
        made = super().command(name, cls=Command, **more)
        return lambda function: made(spread(function))


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"counterpoise {version('counterpoise')}")
        sys.exit()


Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and stop.")
]
