"""Fill reference/cli.md from tests/screens, the snapshots of every --help that tests compare with the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MARK = "<!-- every command -->"
SCREENS = Path(__file__).parents[1] / "tests" / "screens"


def commands(screens: Path = SCREENS) -> str:
    """A heading and the help of each command, in the order of their names."""
    found = {}
    for file in screens.glob("help*.txt"):
        usage = file.read_text(encoding="utf-8")
        words = usage.removeprefix("Usage: ").split(" [OPTIONS]")[0].split(" COMMAND")[0]
        found[words] = f"## `{words}`\n\n```text\n{usage.rstrip()}\n```\n"
    if not found:
        raise ValueError(f"{screens}: expected help-*.txt, found none")
    return "\n".join(found[words] for words in sorted(found))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return markdown.replace(MARK, commands())
