"""Hashes of files, begun early and taken once, and whether a file is still what it was. Nothing here needs torch."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from counterpoise.checkpoints.files import CheckpointError, weight_files

Outcome = TypeVar("Outcome")
Key = TypeVar("Key")
State = tuple[Path, int, int, int, int]
"""Where a file really lies, its inode, size, and the times when its content and its inode changed."""
BUFFER = 1 << 18
_under_way: dict[State, Future[dict[State, str]]] = {}


def sha256(file: Path) -> str:
    """sha256 of a file's content; waits for it where `hash_early` has begun, reads the file otherwise.

    Raises:
        CheckpointError: the file changed meanwhile.
    """
    begun = _under_way.pop(state := state_of(file), None)
    found = _hash(file) if begun is None else begun.result()[state]
    if state_of(file) != state:
        raise changed(file)
    return found


def changed(file: Path) -> CheckpointError:
    """The error for an input that something else writes to."""
    return CheckpointError(
        f"{file}: expected a file that stays as it is, found it changed while it was read; run again once nothing writes to it"
    )


class Watch:
    """Files that are read for a while: none may change between its first reading and its last.

    Size, times and inode tell; where they alone differ (`touch`), the hash decides.
    """

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self._states = {file: state_of(file) for file in files}
        self._hashes: dict[Path, str] = {}

    def sha256(self, file: Path) -> str:
        """sha256 of a file, which is watched from now on, if it was not."""
        self._states.setdefault(file, state_of(file))
        found = sha256(file)
        self.check(file)
        self._hashes[file] = found
        return found

    def check(self, *files: Path) -> None:
        """Look at these files, or at all that are watched, once more.

        Raises:
            CheckpointError: one is not what it was.
        """
        for file in files or self._states:
            state = state_of(file) if file.is_file() else None
            if state == self._states[file]:
                continue
            if state is None or file not in self._hashes or sha256(file) != self._hashes[file]:
                raise changed(file)
            self._states[file] = state


def hash_early(*sources: str | Path) -> None:
    """Begin hashing the weights of local folders in the background, while other things are imported.

    What cannot be read is left for the preflight to complain about.
    """
    found = []
    for folder in (Path(s).expanduser() for s in sources):
        with contextlib.suppress(CheckpointError, OSError):
            found.append(weight_files(folder))
    begin(found)


def begin(sides: Sequence[Sequence[Path]]) -> None:
    """Begin hashing files in the background, those of the sides in step, as they are mixed: each comes from the disk once."""
    work: dict[State, Path] = {}  # two names may lead to one file
    rows: list[list[State]] = []
    for files in zip_longest(*sides):
        states = {state_of(file): file for file in files if file is not None}
        rows.append([state for state in states if state not in work and state not in _under_way])
        work |= states
    hashes = in_background(lambda: {s: h for row in rows for s, h in _hash_in_step({s: work[s] for s in row}).items()})
    _under_way.update(dict.fromkeys((state for row in rows for state in row), hashes))


def in_background(work: Callable[[], Outcome]) -> Future[Outcome]:
    """Start `work` in a thread of its own, a daemon: a failed or stopped run does not wait for it."""
    done: Future[Outcome] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # whatever it is: somebody waits
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def state_of(file: Path) -> State:
    """What tells that a file is no longer what it was."""
    found = file.stat()
    return file.resolve(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _hash(file: Path) -> str:
    return _hash_in_step({file: file})[file]


def _hash_in_step(files: Mapping[Key, Path]) -> dict[Key, str]:
    """Read, not mapped: a file that shrinks meanwhile would kill the process that maps it."""
    buffer, found = memoryview(bytearray(BUFFER)), {key: hashlib.sha256() for key in files}
    with contextlib.ExitStack() as stack:
        left = {key: stack.enter_context(file.open("rb", buffering=0)) for key, file in files.items()}
        while left:
            for key, opened in list(left.items()):
                if count := opened.readinto(buffer):
                    found[key].update(buffer[:count])
                else:
                    del left[key]
    return {key: one.hexdigest() for key, one in found.items()}
