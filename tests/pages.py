"""The pages of the docs: their code blocks, and the commands in them, as the commands' own parser reads them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import typer

from counterpoise.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
SHELL = ("console", "sh", "bash")
FENCE = re.compile(r"^(?:<!-- not run: (?P<why>.+?) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.S | re.M)


class Block(NamedTuple):
    """A fenced block: python and console are run in the tests, unless a comment above says `not run:` and why.

    In the commands of sh and bash, capitals stand for what is yours and `...` for options left out.
    """

    page: Path
    line: int
    language: str
    text: str
    why: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = FENCE.finditer(text)
    return [Block(page, text[: m.start("text")].count("\n"), m["language"], m["text"], m["why"]) for m in found]


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a shell block. Where lines begin with `$ `, the others are what was printed."""
    lines = re.sub(r"\\\n\s*(?:> )?", "", block.text).splitlines()
    typed = [line[2:] for line in lines if line.startswith("$ ")] or lines
    return [words for line in typed if (words := shlex.split(line, comments=True))]


def ours(words: list[str]) -> list[str] | None:
    """What follows `counterpoise`, also behind torchrun or `python -m`; None where the command is another's."""
    if "counterpoise" not in words:
        return None
    at = words.index("counterpoise")
    return words[at + 1 :] if at == 0 or words[at - 1] in ("--", "-m") else None


def parse(words: list[str]) -> None:
    """Read a command as the program does, and run nothing.

    Raises:
        ClickException: an option that is not there, a value that it does not take, a required one that is missing.
    """
    whole, given = "..." not in words, [word for word in words if word != "..."]
    command: Any = typer.main.get_command(app)
    context, name = None, "counterpoise"
    try:
        while True:
            context = command.make_context(name, given, parent=context)
            if not hasattr(command, "commands"):
                return
            name, command, given = command.resolve_command(context, [*context._protected_args, *context.args])
    except SystemExit:  # --version and its like
        return
    except Exception as error:
        if whole or type(error).__name__ != "MissingParameter":
            raise
