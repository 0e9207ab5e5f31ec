"""The house: a room imports only rooms below it, also lazily, and no file takes another's private names."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, version
from pathlib import Path

import counterpoise

ROOT = Path(counterpoise.__file__).parent
ROOMS = (
    "__main__", "cli", "demo", "planning", "restoration", "report", "judging", "search", "alignment", "evaluation",
    "averaging", "tables", "classification", "language", "multitask", "records", "checkpoints", "statistics", "ranks",
)  # fmt: skip
"""From the top down."""


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports() -> Iterator[tuple[str, str, str]]:
    """Every (importing module, imported module, name) of the package, wherever in a file it stands."""
    for file in sorted(ROOT.rglob("*.py")):
        if file == ROOT / "__init__.py":  # the public names, from everywhere
            continue
        module = ".".join(["counterpoise", *file.relative_to(ROOT).with_suffix("").parts])
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((module, a.name, "") for a in node.names if a.name.startswith("counterpoise."))
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: expected absolute imports"
                if node.module == "counterpoise":
                    yield from ((module, f"counterpoise.{a.name}", "") for a in node.names)
                elif node.module and node.module.startswith("counterpoise."):
                    yield from ((module, node.module, a.name) for a in node.names)


def test_a_room_imports_only_rooms_below_it() -> None:
    found = {(a, b) for a, b, _ in imports() if room_of(a) != room_of(b)}
    assert len(found) > 50
    assert not [(a, b) for a, b in found if ROOMS.index(room_of(a)) >= ROOMS.index(room_of(b))]


def test_no_two_files_import_each_other() -> None:
    files = {".".join(["counterpoise", *f.relative_to(ROOT).with_suffix("").parts]) for f in ROOT.rglob("*.py")}
    below: dict[str, set[str]] = {}
    for a, b, name in imports():
        below.setdefault(a, set()).add(f"{b}.{name}" if f"{b}.{name}" in files else b)
    below.pop("counterpoise.__init__", None)
    while leaves := [a for a, bs in below.items() if not bs & below.keys()]:
        for leaf in leaves:
            del below[leaf]
    assert not below


def test_private_names_stay_in_their_files() -> None:
    assert not [(a, b, n) for a, b, n in imports() if n.startswith("_") or any(p.startswith("_") for p in b.split("."))]


def test_functions_outside_the_commands_have_at_most_twelve_parameters() -> None:
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and file.parent.name != "cli":
                given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                found += [f"{file.stem}.{node.name}"] * (len([a for a in given if a not in ("self", "cls")]) > 12)
    assert set(found) <= {"restore.restore"}  # every setting of a Request by its name


def test_no_package_has_the_name_of_a_public_function() -> None:
    assert not {f.stem for f in ROOT.iterdir()} & set(counterpoise._HOMES)


def test_public_names_are_shown_and_found() -> None:
    assert {*counterpoise._HOMES, "__version__"} <= set(dir(counterpoise))
    assert all(getattr(counterpoise, name).__name__ == name for name in counterpoise._HOMES)
    assert not [name for name in counterpoise._HOMES if not re.search(rf"\b{name}\b", counterpoise.__doc__)]
    told = ast.parse(inspect.getsource(counterpoise))
    typed = {a.asname for node in ast.walk(told) if isinstance(node, ast.ImportFrom) for a in node.names if a.asname}
    assert typed == set(counterpoise._HOMES)  # what type checkers see
    assert counterpoise.__version__ == version("counterpoise")


def test_help_of_the_package_fits_a_few_screens() -> None:
    shown = pydoc.plain(pydoc.render_doc(counterpoise))
    assert len(shown.splitlines()) < 250
    assert all(f"\n    {verb}(" in shown for verb in counterpoise.__all__)


def test_the_command_is_a_module_too() -> None:
    said = [
        subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True).stdout
        for module in ("counterpoise", "counterpoise.cli")
    ]
    assert "restore" in said[0]
    assert said[0].split()[5:] == said[1].split()[5:]
    assert EntryPoint("counterpoise", "counterpoise.cli:main", "console_scripts").load().__name__ == "main"
