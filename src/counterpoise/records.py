"""What a run leaves behind: finished pieces of work keyed by their content, json, versions; and how it tells of its progress."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from counterpoise.checkpoints.files import replacing

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (done, total) as long work advances."""
Stages = Callable[[str, int, int], None]
"""Called with (stage, done, total) as work advances."""
NUMERICS = 5
"""Part of the keys of what a pair of checkpoints scores; raised with every change of counterpoise that changes numbers."""


_PLACE = re.compile(r"(?<![\w/.~-])/(?:[^\s/'\"<>|:]+/)+[^\s/'\"<>|:;,?#)\]]+")


def public(value: Any) -> Any:
    """A json value in which absolute paths of this machine are names: of others' business is what a file holds.

    What lies below the working directory is named from there, a snapshot in the hub's cache by its id, the rest by its
    last part.
    """
    if isinstance(value, str):
        return _PLACE.sub(lambda found: _named_place(found[0]), value.replace(f"{Path.cwd()}/", ""))
    if isinstance(value, dict):
        return {public(k) if isinstance(k, str) else k: public(v) for k, v in value.items()}
    return [public(v) for v in value] if isinstance(value, (list, tuple)) else value


def _named_place(text: str) -> str:
    path = Path(text)
    if cached := re.search(r"/models--([^/]+)--([^/]+)/snapshots/[^/]+", text):
        return f"{cached[1]}/{cached[2]}{text[cached.end() :]}"
    return path.name if os.path.lexists(path) or (path.parent.is_dir() and path.parent != Path("/")) else text


def digest(content: Any) -> str:
    """sha256 of a json value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Store:
    """A folder with one json file per finished piece of work, made for the first of them.

    A file appears whole or not at all, so a killed run leaves nothing to repair, and several processes, also of several
    machines, may share one folder: the worst that happens is that a piece of work is done twice, with the same result.
    A file that was torn all the same (a lost disk, a broken copy) is no piece: the work is done again and replaces it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def once(self, key: Mapping[str, Any], work: Callable[[], T]) -> T:
        """The json value stored for `key`, or `work()`, which is then stored."""
        path = self._place(key)
        with contextlib.suppress(ValueError, FileNotFoundError):  # torn
            return json.loads(path.read_text(encoding="utf-8"))["value"]  # type: ignore[no-any-return]
        value = work()
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps({"key": key, "value": value}), encoding="utf-8")
        return value

    def holds(self, key: Mapping[str, Any]) -> bool:
        """Whether there is a value for `key`."""
        return self._place(key).is_file()

    def _place(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{key.get('what', 'item')}-{digest(key)[:24]}.json"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": sys.version.split()[0]}
    for name in ("counterpoise", "torch", "transformers", "safetensors", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The values of a jsonl file that a run writes; none where there is no file. A kill may have cut the last one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_json(path: Path, content: Any) -> None:
    """Write readable json with a stable order of keys, whole or not at all."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def named(stages: Stages | None, name: str) -> Progress | None:
    """The progress of one stage; None where nobody listens."""
    return None if stages is None else lambda done, total: stages(name, done, total)
