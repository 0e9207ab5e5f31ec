"""What users see changes only on purpose: every --help, and tables and errors, as they stand in tests/screens.

After a change that is wanted: `SCREENS=write pytest tests/test_screens.py`, and look at the difference.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from counterpoise.cli.app import app
from counterpoise.cli.terminal import show_tax
from report.made import results
from tiny import save_pair

SCREENS = Path(__file__).parent / "screens"


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    group = group or typer.main.get_command(app)
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


def see(name: str, screen: str) -> None:
    """Compare with the stored screen, or store it."""
    screen = "\n".join(line.rstrip() for line in screen.splitlines()) + "\n"
    file = SCREENS / f"{name}.txt"
    if os.environ.get("SCREENS") == "write":
        file.write_text(screen, encoding="utf-8")
    assert file.is_file(), f"{file}: no such screen; write it with SCREENS=write"
    assert screen == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", list(commands()), ids=lambda path: " ".join(path) or "counterpoise")
def test_the_help_of_every_command(path: tuple[str, ...]) -> None:
    found = CliRunner().invoke(
        app, [*path, "--help"], prog_name="counterpoise", env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}
    )
    assert found.exit_code == 0
    assert max(map(len, found.stdout.splitlines())) <= 80
    assert "…" not in found.stdout
    if path and "COMMAND [ARGS]" not in found.stdout:
        assert re.search("^  -q, --quiet +Nothing on stderr but warnings and errors[.]$", found.stdout, re.M)
        assert f"Example:\n  counterpoise {' '.join(path)} ".replace("align model", "align") in found.stdout
    see("-".join(("help", *path)), found.stdout)


ERRORS = [
    "average",
    "averge pre post",
    "average pre post -o out --ratio 1 --rato 2",
    "average pre post -o out",
    "average nowhere post -o out --ratio 0.5",
    "average pre post -o pre --ratio 0.5",
    "diff pre post --blocks 99",
    "restore pre post -o out --search best",
    "restore pre post -o out --prompts nowhere.jsonl --reward a:b --abilities choices:nowhere.jsonl --device cpu",
    "tax pre post",
    "tax --from nowhere post",
    "front nowhere.json",
    "judge compare a.json b.json -o c.json",
    "align pre -o out --method sft",
    "multitask evaluate nowhere --data nowhere",
]


def test_what_is_said_of_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    told = []
    for words in ERRORS:
        found = CliRunner().invoke(app, words.split(), prog_name="counterpoise", env={"COLUMNS": "80"})
        assert found.exit_code in (1, 2), words
        assert "Traceback" not in found.output
        told.append(f"$ counterpoise {words}\n{found.output}".replace(str(tmp_path), "/here"))
    see("errors", "\n".join(told))


def test_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show_tax(results())
    pre, post = save_pair(tmp_path)
    CliRunner().invoke(app, ["diff", str(pre), str(post)])
    shown = capsys.readouterr().out + CliRunner().invoke(app, ["diff", str(pre), str(post), "-q"]).stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown  # no name is cut
    see("tables", shown)


def test_a_pipe_gets_neither_bars_nor_colours_and_json_is_alone(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "counterpoise", "diff", pre, post, "--json"],
        capture_output=True, text=True, check=True, env={**os.environ, "FORCE_COLOR": ""},
    )  # fmt: skip
    assert {row["kind"] for row in json.loads(done.stdout)} == {"all", "block", "module"}
    assert not re.search("\x1b|━", done.stdout + done.stderr)


def test_a_warning_is_one_line_without_code() -> None:
    code = "import warnings, sys; sys.argv = ['counterpoise', '--version']\nfrom counterpoise.cli.app import main\n"
    code += "try: main()\nexcept SystemExit: warnings.warn('look out')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "warning: look out\n"
